"""Whole models after `sparsify`: what is left and said, trained, saved and loaded elsewhere, exported."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertForSequenceClassification, GPT2Config, GPT2Model, T5Config, T5Model

from sparsebert.errors import UserError
from sparsebert.nn import SparseLinear, load_sparsified, sparsify

IDS = torch.tensor([[2, 5, 9, 13, 3, 0], [2, 14, 6, 7, 8, 3]])
LABELS = torch.tensor([0, 1])


@torch.no_grad()
def prune(model: nn.Module, sparsity: float = 0.75) -> nn.Module:
    """Zeros at random in every matrix that is no embedding's, but for the task heads."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name and "classifier" not in name:
            parameter.mul_(torch.rand(parameter.shape, generator=generator) > sparsity)
    return model


def bert(seed: int = 0, **changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = tiny.config("bert")
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = BertForSequenceClassification(config)
    return prune(model).eval()  # type: ignore[return-value]


def reasons(model: nn.Module) -> dict[str, str]:
    return {record.name: record.reason for record in model.sparsification.left}


def test_pruned_matrices_of_other_layers_are_named() -> None:
    config = GPT2Config(vocab_size=24, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=3)
    model = prune(GPT2Model(config))
    report = sparsify(model).sparsification
    why = "it is in a Conv1D, which is no nn.Linear"
    assert reasons(model) == {f"h.0.{name}": why for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert len(report) == 4 and report[0].shape == (16, 48) and 0.7 < report[0].sparsity < 0.8
    others = prune(
        nn.ModuleDict({"rnn": nn.GRU(4, 4), "attention": nn.MultiheadAttention(4, 2), "one": nn.Linear(4, 4)})
    )
    sparsify(others, format="unstructured")
    assert reasons(others)["rnn.weight_hh_l0"] == "it is in a GRU, which is no nn.Linear"
    assert reasons(others)["attention.in_proj_weight"] == "it is in a MultiheadAttention, which is no nn.Linear"
    # Who asked for some layers does not look for these.
    some = prune(nn.ModuleDict({"rnn": nn.GRU(4, 4), "one": nn.Linear(4, 4)}))
    assert not reasons(sparsify(some, format="unstructured", include="one"))


def test_a_weight_that_the_parents_forward_reads_is_left() -> None:
    config = T5Config(vocab_size=24, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = prune(T5Model(config)).eval()
    with torch.no_grad():
        expected = model(input_ids=IDS, decoder_input_ids=IDS).last_hidden_state
        sparsify(model, format="unstructured")
        got = model(input_ids=IDS, decoder_input_ids=IDS).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    # It asks for the dtype in every call, which would make the dense weight each time.
    why = "its parent, a T5DenseActDense, reads its weight itself, which is made anew each time"
    assert reasons(model) == {
        "encoder.block.0.layer.1.DenseReluDense.wo": why,
        "decoder.block.0.layer.2.DenseReluDense.wo": why,
    }


class Adapter(nn.Module):
    """Built like peft's layers."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_adapters_and_weights_yet_to_be_trained_are_left() -> None:
    fresh = nn.Linear(4, 4)
    nn.init.zeros_(fresh.weight)
    model = nn.ModuleDict({"adapted": Adapter(prune(nn.Linear(8, 8))), "fresh": fresh})  # type: ignore[arg-type]
    sparsify(model, format="unstructured", min_sparsity=0.0)
    why = "it belongs to an adapter (Adapter); merge that first (peft: merge_and_unload)"
    assert reasons(model) == {
        "adapted.base_layer": why,
        "adapted.lora_A.default": why,
        "adapted.lora_B.default": why,
        "fresh": "all its weights are zero, as if it were yet to be trained; from_linear takes it",
    }


def test_what_could_be_trained_still_can() -> None:
    model = bert()
    frozen = model.bert.encoder.layer[0].output.dense.requires_grad_(False)
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not frozen.weight.requires_grad
    sparsify(model, format="unstructured")
    got = {name.replace("values", "weight") for name, p in model.named_parameters() if p.requires_grad}
    assert got == wanted
    blocks = sparsify(bert(), format="blocks:4x4")
    layers = [blocks.get_submodule(record.name) for record in blocks.sparsification.replaced]
    assert all(not layer.values.requires_grad and layer.bias.requires_grad for layer in layers)
    assert {record.reason for record in blocks.sparsification.replaced} == {
        "as asked for; frozen, for this format stores pruned weights too"
    }
    for trainable in (False, True):
        model = sparsify(bert(), format="unstructured", trainable=trainable)
        for record in model.sparsification.replaced:
            assert {p.requires_grad for p in model.get_submodule(record.name).parameters()} == {trainable}
    refused = sparsify(bert(), format="blocks:4x4", trainable=True).sparsification
    assert not refused.replaced and "it stores pruned weights as zeros here" in refused.left[0].reason


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=1e-2),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    ],
)
@pytest.mark.parametrize("format", ["unstructured", "blocks:1x1"])
def test_training_moves_kept_weights_alone(format: str, optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
    model = sparsify(bert(), format=format, exclude="classifier").train()
    stored = {record.name: model.get_submodule(record.name).stored for record in model.sparsification.replaced}
    before = {name: model.get_submodule(name).weight.detach() for name in stored}
    model.gradient_checkpointing_enable()
    step = optimizer(model.parameters())
    for _ in range(2):
        step.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(IDS, labels=LABELS).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step.step()
    for name, mask in stored.items():
        weight = model.get_submodule(name).weight
        assert bool((weight[~mask] == 0).all()) and bool((weight != before[name]).any())


def test_transformers_trainer_trains_saves_and_resumes(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": IDS[i % 2], "labels": LABELS[i % 2]} for i in range(8)]

    def run(model: nn.Module, steps: int, **resume: Any) -> nn.Module:
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, per_device_train_batch_size=4, save_steps=2, use_cpu=True, report_to=[],
            disable_tqdm=True, learning_rate=1e-2, weight_decay=0.1,
            lr_scheduler_type="constant",
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=data).train(**resume)
        return model

    first = run(sparsify(bert(), format="unstructured", exclude="classifier"), 2)
    second = run(sparsify(bert(), format="unstructured", exclude="classifier"), 3, resume_from_checkpoint=True)
    layer, later = (model.bert.encoder.layer[0].output.dense for model in (first, second))
    assert torch.equal(layer.stored, later.stored) and not torch.equal(layer.values, later.values)
    # What Trainer saved loads into a model that was never sparse.
    loaded = load_sparsified(bert(7), load_file(tmp_path / "checkpoint-2" / "model.safetensors")).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, first.eval()(IDS).logits)


def test_parameters_may_be_given_from_outside() -> None:
    model = sparsify(bert(), format="unstructured")
    twice = {name: 2 * parameter.detach() for name, parameter in model.named_parameters()}
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
        got = torch.func.functional_call(model, twice, (IDS,)).logits
        assert torch.equal(got, other(IDS).logits)


@pytest.mark.parametrize("format", ["unstructured", "blocks:4x4", "compact"])
def test_a_sparsified_state_loads_into_an_ordinary_model(format: str, tmp_path: Path) -> None:
    model = sparsify(bert(), format=format, exclude="*attention*")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    fresh = bert(7).train()
    frozen = fresh.bert.encoder.layer[0].output.dense.requires_grad_(False)
    assert load_sparsified(fresh, load_file(tmp_path / "model.safetensors")) is fresh
    with torch.no_grad():
        assert torch.equal(fresh.eval()(IDS).logits, model(IDS).logits)
    assert type(fresh.bert.encoder.layer[0].attention.self.query) is nn.Linear
    layers = [fresh.bert.encoder.layer[index].output.dense for index in (0, 1)]
    assert [layer.format for layer in layers] == [format, format] and not frozen.weight.requires_grad
    assert not layers[0].values.requires_grad and layers[1].values.requires_grad == layers[1].exact
    # Once more, into the sparse model.
    load_sparsified(fresh, model.state_dict())


def test_it_loads_on_the_meta_device_in_another_dtype_and_in_two_places() -> None:
    shared = prune(nn.Linear(8, 8))
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.Linear(8, 2)), "b": shared})
    state = sparsify(model, format="unstructured").state_dict()
    # A plain dict: torch notes in the other what was assigned once, and then always assigns.
    state = dict(state)

    def plain(**where: Any) -> nn.ModuleDict:
        one = nn.Linear(8, 8, **where)
        return nn.ModuleDict({"a": nn.Sequential(one, nn.Linear(8, 2, **where)), "b": one})

    x = torch.randn(3, 8)
    meta = load_sparsified(plain(device="meta"), state, assign=True)
    assert torch.equal(meta["b"](x), model["b"](x)) and meta["a"][0] is meta["b"]
    double = load_sparsified(plain(dtype=torch.float64), state)
    assert isinstance(double["b"], SparseLinear)
    torch.testing.assert_close(double["b"](x.double()).float(), model["b"](x))


def test_what_does_not_load_is_named() -> None:
    state = sparsify(bert(), format="unstructured").state_dict()
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got dict"):
        load_sparsified({}, state)  # type: ignore[type-var]
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "bert\.'):
        load_sparsified(nn.Sequential(nn.Linear(2, 2)), state)
    key = "bert.pooler.dense.layout"
    model = bert()
    with pytest.raises(ValueError, match=f"{key}: expected an int64 tensor"):
        load_sparsified(model, {**state, key: torch.zeros(8)})
    assert type(model.bert.pooler.dense) is nn.Linear
    with pytest.raises(RuntimeError, match=r"the saved weight is \[16, 16\], the layer's \[4, 4\]"):
        load_sparsified(
            nn.Sequential(nn.Linear(4, 4)), {f"0.{k.split('.')[-1]}": v for k, v in state.items() if "pool" in k}
        )


@pytest.mark.parametrize("format", ["unstructured", "blocks:4x4", "compact"])
def test_it_can_be_exported_with_gradients_on_and_trained_after(format: str) -> None:
    model = sparsify(bert(), format=format)
    program = torch.export.export(model, (IDS,))
    assert torch.equal(program.module()(IDS).logits, model(IDS).logits)
    model.train()(IDS, labels=LABELS).loss.backward()
    assert model.bert.embeddings.word_embeddings.weight.grad is not None


def test_a_setting_that_cannot_be_changes_nothing() -> None:
    model = bert()
    wrong: list[dict[str, Any]] = [{"include": "encodr.*"}, {"exclude": 3}, {"rows": 16}, {"format": "blocks"}]
    for settings in [*wrong, {"min_sparsity": "half"}, {"include": [3]}]:
        with pytest.raises(UserError, match=next(iter(settings))):
            sparsify(model, dtype=torch.float64, **settings)
    assert model.dtype == torch.float32 and not hasattr(model, "sparsification")
    with pytest.raises(UserError, match="'3' matches no linear layer of the model; the first are: none"):
        sparsify(nn.Sequential(nn.Conv2d(1, 1, 1)), include="3")
