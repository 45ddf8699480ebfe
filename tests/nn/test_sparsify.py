"""sparsify: which layers of a model become sparse, what it says of the others, and that the model stays the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import sparsebert
from sparsebert.errors import UserError
from sparsebert.nn import MaskedLinear, Masks, SparseLinear, Sparsification, sparsify
from sparsebert.patterns import Matrix, parse_pattern


class Clock:
    """A timer by which sparse formats take this share of dense's time, a quick name aside; it counts its calls."""

    def __init__(self, share: float = 0.5) -> None:
        self.share, self.asked = share, 0

    def __call__(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        self.asked += 1
        return {name: 1.0 if name in ("F.linear", "dense_linear") else self.share for name in calls}


@torch.no_grad()
def prune(linear: nn.Linear, sparsity: float = 0.75, seed: int = 0) -> nn.Linear:
    """Zeros at random, exactly that share of them."""
    count = round(sparsity * linear.weight.numel())
    order = torch.randperm(linear.weight.numel(), generator=torch.Generator().manual_seed(seed))
    linear.weight.view(-1)[order[:count]] = 0.0
    return linear


def bert(sparsity: float = 0.75) -> nn.Module:
    """A tiny random BERT whose encoder's linears are pruned."""
    model = tiny.base("bert")
    for seed, module in enumerate(model.encoder.modules()):
        if isinstance(module, nn.Linear):
            prune(module, sparsity, seed)
    return model


IDS = torch.tensor([[2, 5, 9, 13, 3, 0], [2, 14, 6, 7, 8, 3]])


@pytest.mark.parametrize("format", ["unstructured", "compact", "auto"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_transformer_computes_what_it_did(kind: str, format: str) -> None:
    model = tiny.base(kind)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for seed, (name, linear) in enumerate(linears.items()):
        if "layer" in name:
            prune(linear, seed=seed)
    mask = (IDS != 0).long()
    with torch.no_grad():
        expected = model(IDS, attention_mask=mask).last_hidden_state
        assert sparsify(model, format=format, timer=Clock()) is model
        torch.testing.assert_close(model(IDS, attention_mask=mask).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    assert {record.name for record in model.sparsification.replaced} == {name for name in linears if "layer" in name}
    assert len(model.sparsification.replaced) == 12
    assert all(isinstance(model.get_submodule(r.name), SparseLinear) for r in model.sparsification.replaced)


def test_the_report_says_what_became_of_every_layer() -> None:
    model = nn.Sequential(prune(nn.Linear(64, 32)), nn.GELU(), nn.Linear(32, 16), prune(nn.Linear(16, 10), 0.3))
    report = sparsify(model, timer=Clock(0.25)).sparsification
    assert isinstance(report, Sparsification) and [record.name for record in report] == ["0", "2", "3"]
    first, second, third = report
    assert (first.action, first.format, first.shape, first.sparsity, first.speedup) == (
        *("replaced", "unstructured", (32, 64), 0.75, 4.0),
    )
    assert first.bytes_before == 4 * 64 * 32 and first.bytes_after == model[0].nbytes < first.bytes_before
    assert first.reason == "unstructured is 4.00x as fast as the best dense path"
    assert (second.action, second.format, second.bytes_after, second.speedup) == ("left", "dense", 4 * 32 * 16, None)
    assert second.reason == "less than 30% of its weights are zero"
    # Exactly the share that was asked for is enough.
    assert third.action == "replaced" and type(model[2]) is nn.Linear
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "shape", "zero", "format", "bytes", "speed", "reason"]
    assert lines[1].startswith("0      32x64  75.0%  replaced  unstructured  8,192 -> ") and "4.00x" in lines[1]
    assert lines[-1].startswith("2 of 3 layers replaced; all their weights: 10,880 -> ")
    assert [r.name for r in report.left] == ["2"] and repr(report) == "<Sparsification: 2 replaced, 1 left>"
    assert copy.deepcopy(model).sparsification == report and str(Sparsification([])) == "no linear layers"


def test_a_layer_that_dense_runs_faster_is_left() -> None:
    model = nn.Sequential(prune(nn.Linear(64, 32)))
    linear = model[0]
    (record,) = sparsify(model, timer=Clock(1.0)).sparsification
    assert model[0] is linear and record.action == "left" and record.speedup == 1.0
    assert record.reason.startswith("no sparse format is 5% faster than dense at every number of rows")


def test_layers_of_equal_shape_and_structure_share_a_measurement() -> None:
    clock = Clock()
    # At one half, blocks are as good as full whatever the seed.
    layers = [prune(nn.Linear(128, 128), 0.5, seed) for seed in range(4)]
    model = nn.Sequential(*layers, prune(nn.Linear(128, 64), 0.5))
    sparsify(model, timer=clock, rows=(4,))
    assert clock.asked == 2 and len(model.sparsification.replaced) == 5


def test_one_format_for_all_measures_nothing() -> None:
    clock = Clock()
    model = nn.Sequential(prune(nn.Linear(64, 32)), prune(nn.Linear(32, 10)))
    report = sparsify(model, format="blocks:4x2", timer=clock).sparsification
    assert clock.asked == 0 and [record.action for record in report] == ["replaced", "left"]
    assert (
        report[0].reason == "as asked for; frozen, for this format stores pruned weights too"
        and report[0].speedup is None
    )
    assert report[1].reason == "blocks:4x2 cannot hold it: block: 4x2 does not divide the weight [10, 32]"


def test_masked_linears_go_by_their_mask() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    matrices = [Matrix("0", (32, 64), "ffn_in"), Matrix("2", (16, 32), "ffn_out")]
    masks = Masks(model, matrices, parse_pattern("block:4x4"), dtype=torch.float32)
    masks.select(masks.magnitude(), sparsity=0.75, allocation="matrix")
    x = torch.randn(5, 64)
    expected = model(x)
    learned = copy.deepcopy(model)
    report = sparsify(model, format="blocks:4x4").sparsification
    assert [record.sparsity for record in report] == [0.75, 0.75] and len(report.replaced) == 2
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(learned[0], MaskedLinear)
    learned[0].hold_score(nn.Parameter(torch.zeros(8, 16)))
    report = sparsify(learned, format="unstructured").sparsification
    assert report[0].reason == "its mask is still being learned" and report[1].action == "replaced"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, 16)
        self.decoder = prune(nn.Linear(16, 24))
        self.embedding.weight = self.decoder.weight
        self.first, self.second = prune(nn.Linear(16, 16)), prune(nn.Linear(16, 16))
        self.second.bias = self.first.bias


def test_tied_parameters_are_left() -> None:
    report = sparsify(Tied(), format="unstructured").sparsification
    assert {record.name: record.reason for record in report} == {
        "decoder": "its weight is tied to embedding.weight",
        "first": "its bias is tied to second.bias",
        "second": "its bias is tied to first.bias",
    }


def test_the_decoder_of_a_masked_language_model_is_left() -> None:
    from transformers import BertForMaskedLM

    model = BertForMaskedLM(tiny.config("bert"))
    prune(model.cls.predictions.decoder)
    report = sparsify(model, format="unstructured", min_sparsity=0.0).sparsification
    (decoder,) = [record for record in report if record.name.endswith("decoder")]
    assert decoder.action == "left" and decoder.reason.startswith("its weight is tied to bert.embeddings.word_embed")
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def test_a_module_in_two_places_is_replaced_in_both() -> None:
    shared = prune(nn.Linear(16, 16))
    model = nn.ModuleDict({"a": nn.Sequential(shared, shared), "b": shared})
    (record,) = sparsify(model, format="unstructured").sparsification
    assert record.name == "a.0" and isinstance(model["b"], SparseLinear)
    assert model["a"][0] is model["a"][1] is model["b"]


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_layers_with_a_life_of_their_own_are_left() -> None:
    linears = {name: prune(nn.Linear(16, 16)) for name in ("hook", "parametrized", "pruned", "patched", "int8")}
    linears["hook"].register_forward_hook(lambda *_: None)
    nn.utils.parametrizations.weight_norm(linears["parametrized"])
    torch_prune.l1_unstructured(linears["pruned"], "weight", 0.5)
    linears["patched"].forward = lambda x: x  # type: ignore[method-assign]
    linears["int8"].weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)
    model = nn.ModuleDict(
        {
            **linears,
            "subclass": prune(Scaled(16, 16)),
            "meta": nn.Linear(16, 16, device="meta"),
            "lazy": nn.LazyLinear(16),
            "sparse": SparseLinear(16, 16),
            "attention": nn.MultiheadAttention(16, 2),
            "encoder": nn.TransformerEncoderLayer(16, 2, 32),
        }
    )
    report = {record.name: record for record in sparsify(model, format="unstructured", min_sparsity=0.0).sparsification}
    assert {record.action for record in report.values()} == {"left"}
    expected = {
        "hook": "it has hooks, which would be lost",
        "parametrized": "it is parametrized; call",
        "pruned": "torch.nn.utils holds its weight in a hook",
        "patched": "its forward was replaced by another function",
        "int8": "weight: expected a float tensor, got torch.int8",
        "subclass": "it is a Scaled, a subclass of nn.Linear",
        "meta": "weight: expected data, got a tensor on the meta device",
        "lazy": "it is a LazyLinear, a subclass of nn.Linear",
        "sparse": "it is a SparseLinear already",
        "attention.out_proj": "it is a NonDynamicallyQuantizableLinear, a subclass",
        "encoder.self_attn.out_proj": "it is a NonDynamicallyQuantizableLinear, a subclass",
        "encoder.linear1": "its parent, a TransformerEncoderLayer, reads its weight itself",
        "encoder.linear2": "its parent, a TransformerEncoderLayer, reads its weight itself",
    }
    assert report.keys() == expected.keys()
    for name, reason in expected.items():
        assert report[name].reason.startswith(reason), report[name].reason


def test_include_and_exclude() -> None:
    model = bert()
    kept = {"include": "encoder.layer.1.*", "exclude": ["*.query", "*.key"]}
    report = sparsify(model, format="unstructured", **kept).sparsification  # type: ignore[arg-type]
    assert [record.name.removeprefix("encoder.layer.1.") for record in report.replaced] == [
        *("attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense"),
    ]
    assert {record.reason for record in report.left} == {"excluded"}
    for argument in ("include", "exclude"):
        with pytest.raises(UserError, match=rf"{argument}: 'encodr\.\*' matches no linear layer .* 'encoder\.layer\.0"):
            sparsify(model, **{argument: ["encodr.*"]})  # type: ignore[arg-type]


def test_a_dtype_is_that_of_the_whole_model() -> None:
    model = sparsify(bert(), format="unstructured", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert bool(torch.isfinite(model(IDS).last_hidden_state).all())


def test_a_sparsified_model_can_be_trained_where_asked_for() -> None:
    model = sparsify(bert(), format="unstructured", trainable=True).train()
    zeros = {r.name: ~model.get_submodule(r.name).stored for r in model.sparsification.replaced}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(IDS).last_hidden_state.square().sum().backward()
    optimizer.step()
    for name, zero in zeros.items():
        layer = model.get_submodule(name)
        assert layer.values.grad is not None and bool((layer.weight[zero] == 0).all())


def test_its_state_loads_into_the_same_model_sparsified_elsewise() -> None:
    model = sparsify(bert(), format="unstructured")
    other = sparsify(bert(0.9), format="compact")
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(IDS).last_hidden_state, model(IDS).last_hidden_state)


def test_it_is_there_at_the_top() -> None:
    assert sparsebert.sparsify is sparsify and sparsebert.SparseLinear is SparseLinear


def test_what_cannot_be_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    for root in (nn.Linear(4, 4), SparseLinear(4, 4)):
        with pytest.raises(UserError, match=r"use SparseLinear\.from_linear\(linear\)"):
            sparsify(root)
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got dict"):
        sparsify({})  # type: ignore[type-var]
    with pytest.raises(UserError, match=r"min_sparsity: expected a share from 0 to 1, got 50"):
        sparsify(model, min_sparsity=50)
    with pytest.raises(UserError, match="unknown format 'autto'"):
        sparsify(model, format="autto")
    with pytest.raises(UserError, match=r"dtype: expected a float dtype such as torch\.bfloat16, got bf16"):
        sparsify(model, dtype="bf16")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="rows: expected numbers of rows"):
        sparsify(model, rows=(0,), min_sparsity=0.0)
    assert not hasattr(model, "sparsification")
