"""`sparsify` on models that are no BERT: a ViT, a GPT-2, a T5, and a module written by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import sparsebert
from sparsebert.nn import SparseLinear, load_sparsified

FORMATS = ("unstructured", "blocks:4x4")
IDS = torch.tensor([[2, 5, 9, 13, 3, 7], [2, 14, 6, 7, 8, 3]])


@torch.no_grad()
def prune(model: nn.Module) -> nn.Module:
    """Zeros three of four 4 x 4 blocks, at random, in every matrix that is no embedding's and no classifier's."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and not {"embed", "shared", "wte", "wpe", "classifier"} & set(
            name.replace("_", ".").split(".")
        ):
            rows, columns = parameter.shape
            kept = torch.rand(-(-rows // 4), -(-columns // 4), generator=generator) > 0.75
            parameter.mul_(kept.repeat_interleave(4, 0)[:rows].repeat_interleave(4, 1)[:, :columns])
    return model.eval()


def vit() -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_labels=4,
    )  # fmt: skip
    return prune(ViTForImageClassification(config))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=24, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=3, pad_token_id=0
    )
    return prune(GPT2LMHeadModel(config))  # type: ignore[return-value]


def t5(gated: bool = False) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=24, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu" if gated else "relu",
    )  # fmt: skip
    return prune(T5ForConditionalGeneration(config))  # type: ignore[return-value]


def replaced(model: nn.Module) -> list[str]:
    return [record.name for record in model.sparsification.replaced]


def left(model: nn.Module) -> dict[str, str]:
    return {record.name: record.reason for record in model.sparsification.left}


@torch.no_grad()
@pytest.mark.parametrize("format", FORMATS)
def test_a_vit_computes_what_it_did(format: str) -> None:
    model, pixels = vit(), torch.randn(3, 3, 8, 8)
    expected = model(pixel_values=pixels).logits
    sparsebert.sparsify(model, format=format)
    torch.testing.assert_close(model(pixel_values=pixels).logits, expected, rtol=1e-5, atol=1e-5)
    # The patches' convolution is no linear, and was not pruned.
    assert len(replaced(model)) == 12 and left(model) == {"classifier": "less than 30% of its weights are zero"}
    fresh = load_sparsified(ViTForImageClassification(model.config).eval(), model.state_dict())
    torch.testing.assert_close(fresh(pixel_values=pixels).logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_gpt2_stays_as_it_is_and_says_why() -> None:
    model = gpt2()
    expected = model(input_ids=IDS).logits
    sparsebert.sparsify(model, format="unstructured")
    assert torch.equal(model(input_ids=IDS).logits, expected)
    # Its matrices lie in transformers' Conv1D, the transposed weight of a linear; replacing those would change the
    # names and shapes that every GPT-2 checkpoint has.
    why = "it is in a Conv1D, which is no nn.Linear"
    inner = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert left(model) == {
        "lm_head": "its weight is tied to transformer.wte.weight",
        **{f"transformer.h.{layer}.{name}": why for layer in (0, 1) for name in inner},
    }
    assert not replaced(model)


@torch.no_grad()
def test_a_gpt2_with_linears_in_place_of_conv1d_is_sparse() -> None:
    model = gpt2()
    expected, said = model(input_ids=IDS).logits, model.generate(IDS, max_new_tokens=5, do_sample=False)
    for parent in list(model.modules()):
        for name, old in list(parent.named_children()):
            if type(old).__name__ == "Conv1D":
                linear = nn.Linear(old.nx, old.nf)
                linear.weight.copy_(old.weight.t())
                linear.bias.copy_(old.bias)
                setattr(parent, name, linear)
    sparsebert.sparsify(model, format="unstructured")
    assert len(replaced(model)) == 8 and list(left(model)) == ["lm_head"]
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), said)


@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_a_t5_generates_what_it_did(format: str, gated: bool) -> None:
    model = t5(gated)
    expected, said = (
        model(input_ids=IDS, decoder_input_ids=IDS).logits,
        model.generate(IDS, max_new_tokens=6, num_beams=2, do_sample=False),
    )
    sparsebert.sparsify(model, format=format)
    torch.testing.assert_close(model(input_ids=IDS, decoder_input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.generate(IDS, max_new_tokens=6, num_beams=2, do_sample=False), said)
    # Each encoder layer 4 of attention, each decoder layer 8; one or two that lead into a feed-forward block, whose
    # second linear is read by its parent.
    assert len(replaced(model)) == 2 * (4 + 8) + 4 * (2 if gated else 1)
    reasons = left(model)
    assert sum("reads its weight itself" in why for why in reasons.values()) == 4
    assert {name for name in reasons if not name.endswith(".wo")} == {"lm_head"}
    assert reasons["lm_head"].startswith("its weight is tied to")


class ByHand(nn.Module):
    """Linears of all sorts: in a list, shared, without bias, called twice, of odd sizes, and a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(5, 12, 3, padding=1)
        self.steps = nn.ModuleList([nn.Linear(12, 12, bias=False) for _ in range(2)])
        self.twice = nn.Linear(12, 12)
        self.again = self.twice
        self.odd = nn.Linear(12, 7)
        self.own = nn.Parameter(torch.randn(7, 3))

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        hidden = self.conv(x).transpose(1, 2)
        for step in self.steps:
            hidden = hidden + F.gelu(step(hidden))
        hidden = self.again(F.relu(self.twice(hidden)))
        return {"out": scale * self.odd(hidden).mean(1) @ self.own}


@torch.no_grad()
def test_a_module_written_by_hand() -> None:
    model, x = prune(ByHand()), torch.randn(2, 5, 9)
    expected = model(x, scale=0.5)["out"]
    sparsebert.sparsify(model, format="unstructured")
    torch.testing.assert_close(model(x, scale=0.5)["out"], expected, rtol=1e-5, atol=1e-5)
    assert set(replaced(model)) == {"steps.0", "steps.1", "twice", "odd"}
    assert model.again is model.twice and isinstance(model.twice, SparseLinear)
    assert left(model) == {"own": "it is in a ByHand, which is no nn.Linear"}


@pytest.mark.parametrize("build", [vit, t5, lambda: prune(ByHand())], ids=["vit", "t5", "by hand"])
def test_what_is_not_worth_it_is_left(build: Callable[[], nn.Module]) -> None:
    model = build()
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    sparsebert.sparsify(model, min_sparsity=0.99)
    assert not replaced(model) and set(linears) <= set(left(model))
    assert not any(isinstance(module, SparseLinear) for module in model.modules())


@pytest.mark.parametrize("format", ["unstructured"])
def test_a_sparse_vit_and_t5_learn(format: str) -> None:
    for model, inputs in (
        (vit(), {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([1, 3])}),
        (t5(), {"input_ids": IDS, "labels": IDS}),
    ):
        sparsebert.sparsify(model, format=format, trainable=True).train()
        model(**inputs).loss.backward()
        layers = [model.get_submodule(name) for name in replaced(model)]
        assert layers and all(layer.values.grad is not None for layer in layers)
