"""The masked-LM head: read from a checkpoint as transformers wrote it, tied to the word embedding, masked or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM

from sparsebert.errors import UserError
from sparsebert.models.load import load_base
from sparsebert.models.mlm_head import MaskedLMHead, new_mlm_head, read_mlm_head, word_embeddings
from sparsebert.models.prunable import prunable_matrices
from sparsebert.nn import Masks
from sparsebert.patterns import parse_pattern

IDS = torch.tensor([[2, 5, 6, 4, 3], [2, 9, 4, 8, 3]])


def save_mlm(folder: Path, tiny: Any, kind: str, shard: str = "5GB") -> Any:
    """A checkpoint with a head whose every number is random, and the model that it is of."""
    torch.manual_seed(3)
    model = AutoModelForMaskedLM.from_config(tiny.config(kind)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder, max_shard_size=shard)
    tiny.tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("shard", ["5GB", "2KB"])
def test_its_logits_are_those_of_transformers(tmp_path: Path, tiny: Any, kind: str, shard: str) -> None:
    model = save_mlm(tmp_path, tiny, kind, shard)
    base, _ = load_base(str(tmp_path))
    head = read_mlm_head(str(tmp_path), base)
    assert head is not None
    with torch.no_grad():
        states = base(IDS).last_hidden_state
        torch.testing.assert_close(head(states[0], word_embeddings(base)), model(IDS).logits[0])


def test_a_checkpoint_of_a_bare_model_has_none(tmp_path: Path, tiny: Any, kind: str) -> None:
    folder = tiny.save(tmp_path / "bare", kind)
    base, _ = load_base(str(folder))
    assert read_mlm_head(str(folder), base) is None
    assert read_mlm_head("", base) is None


def test_a_head_with_a_decoder_of_its_own_is_not_taken(tmp_path: Path, tiny: Any) -> None:
    save_mlm(tmp_path, tiny, "bert")
    base, _ = load_base(str(tmp_path))
    base.config.tie_word_embeddings = False
    assert read_mlm_head(str(tmp_path), base) is None


def test_the_old_names_of_a_norm_are_read(tmp_path: Path, tiny: Any) -> None:
    save_mlm(tmp_path, tiny, "bert")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    norm = "cls.predictions.transform.LayerNorm"
    weight = tensors[f"{norm}.weight"]
    for new, old in (("weight", "gamma"), ("bias", "beta")):
        tensors[f"{norm}.{old}"] = tensors.pop(f"{norm}.{new}")
    save_file(tensors, file, {"format": "pt"})
    base, _ = load_base(str(tmp_path))
    head = read_mlm_head(str(tmp_path), base)
    assert head is not None
    assert torch.equal(head.norm.weight, weight)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda tensor: None, "lacks"),
        (lambda tensor: tensor[:-1].clone(), r"is \[7, 8\], expected \[8, 8\]"),
        (lambda tensor: tensor * float("nan"), "NaN"),
    ],
)
def test_a_damaged_head_is_refused_by_name(tmp_path: Path, tiny: Any, change: Any, word: str) -> None:
    save_mlm(tmp_path, tiny, "bert")
    file, name = tmp_path / "model.safetensors", "cls.predictions.transform.dense.weight"
    tensors = load_file(file)
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else {**tensors, name: changed}, file, {"format": "pt"})
    base, _ = load_base(str(tmp_path))
    with pytest.raises(UserError, match=word) as error:
        read_mlm_head(str(tmp_path), base)
    assert name in str(error.value)


def test_the_loss_is_cross_entropy_at_the_places_to_predict(tiny: Any, kind: str) -> None:
    base = tiny.base(kind)
    head, words = new_mlm_head(base, 0), word_embeddings(base)
    states = torch.randn(2, 5, 8)
    labels = torch.tensor([[-100, 5, -100, 6, -100], [-100, -100, -100, 7, -100]])
    logits = head(states.reshape(10, 8), words)
    torch.testing.assert_close(head.loss(states, labels, words), F.cross_entropy(logits, labels.flatten()))
    nothing = head.loss(states, torch.full_like(labels, -100), words)
    nothing.backward()
    assert float(nothing.detach()) == 0.0


def test_a_new_head_is_that_of_its_seed(tiny: Any) -> None:
    base = tiny.base()
    first, again, other = (new_mlm_head(base, seed).dense.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_the_word_embedding_get_the_gradient_of_both_its_uses(tiny: Any, dtype: torch.dtype) -> None:
    """Against autograd through weight * mask with a dense mask."""
    base = tiny.base()
    head, weight = new_mlm_head(base, 0), base.embeddings.word_embeddings.weight
    masks = Masks(base, prunable_matrices(base, ["word_embeddings"]), parse_pattern("unstructured"), dtype)
    generator = torch.Generator().manual_seed(0)
    ranks = [torch.rand(weight.shape, generator=generator)]
    base.requires_grad_(False)
    masks.select(ranks, 0.4, "matrix")
    masks.learn(ranks)
    labels = torch.tensor([5, 11, 7])

    def loss(embedded: torch.Tensor, decode: Any) -> torch.Tensor:
        states = embedded.tanh()
        return F.cross_entropy(decode(states).float(), labels)

    words = word_embeddings(base)
    ids = torch.tensor([5, 6, 5])
    loss(words(ids), lambda states: head(states, words)).backward()
    assert masks.scores is not None
    found = masks.scores[0].grad
    dense = masks.units()[0].float().requires_grad_()
    product = weight * dense
    hidden = lambda states: head.norm(head.activation(head.dense(states)))  # noqa: E731
    loss(product[ids], lambda states: F.linear(hidden(states), product, head.bias)).backward()
    assert found is not None and dense.grad is not None
    if dtype == torch.float32:
        torch.testing.assert_close(found, dense.grad)
    else:
        assert float((found - dense.grad).norm() / dense.grad.norm()) < 0.05


def test_it_holds_no_copy_of_the_word_embedding(tiny: Any) -> None:
    head = MaskedLMHead(tiny.config("bert"))
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {
        "bias": (20,), "dense.weight": (8, 8), "dense.bias": (8,), "norm.weight": (8,), "norm.bias": (8,),
    }  # fmt: skip
