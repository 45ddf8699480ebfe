"""Uneven widths: heads and neurons taken out, written down, saved as a plain checkpoint and loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from models.sparse_models import HEADS, PREFIX, outputs, same
from safetensors.torch import load_file
from torch import nn

from sparsebert import AutoSparseModel, remove_structure, save_sparse, sparsify
from sparsebert.errors import UserError
from sparsebert.models.padding_free import padding_free
from sparsebert.models.per_layer import widths_of
from sparsebert.models.prunable import LAYOUTS
from sparsebert.models.task_model import TaskModel

# By layer: the heads and the neurons that are pruned.
GONE = (([1, 3], [0, 5, 6, 31]), ([], list(range(8, 32))))


def linears(base: nn.Module, index: int) -> dict[str, Any]:
    layout = LAYOUTS[base.config.model_type]  # type: ignore[union-attr, index]
    return {name: base.get_submodule(f"{layout.layers}.{index}.{place}") for name, place in layout.linears}


@torch.no_grad()
def prune(base: nn.Module, gone: Any = GONE, whole: bool = True) -> None:
    """Random weights, and heads (of 4 columns) and neurons zero; not `whole`: only what reads or only what writes."""
    generator = torch.Generator().manual_seed(0)
    for parameter in base.parameters():
        parameter.normal_(std=0.3, generator=generator)
    for index, (heads, neurons) in enumerate(gone):
        parts = linears(base, index)
        for head in heads:
            rows = slice(4 * head, 4 * head + 4)
            parts["value"].weight[rows] = 0
            if whole:
                parts["query"].weight[rows] = parts["key"].weight[rows] = 0
                parts["attention_output"].weight[:, rows] = 0
        for number, neuron in enumerate(neurons):
            if whole or number % 2:
                parts["ffn_in"].weight[neuron] = 0
            if whole or not number % 2:
                parts["ffn_out"].weight[:, neuron] = 0


def uneven(kind: str = "bert", head: str = "Model", whole: bool = True) -> tuple[Any, Any]:
    """A model with structure removed, and the masked one that it was."""
    before = getattr(transformers, PREFIX[kind] + head)(tiny.config(kind)).eval()
    prune(getattr(before, before.base_model_prefix, before), whole=whole)
    after = type(before)(tiny.config(kind)).eval()
    after.load_state_dict(before.state_dict())
    return remove_structure(after), before


def base_of(model: Any) -> Any:
    return getattr(model, model.base_model_prefix, model)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_smaller_model_computes_the_same(kind: str, head: str, whole: bool) -> None:
    model, before = uneven(kind, head, whole)
    assert widths_of(base_of(model)) == [(2, 28), (4, 8)]
    assert model.num_parameters() < before.num_parameters()
    for ours, theirs in zip(outputs(model), outputs(before), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    model.train()(input_ids=torch.tensor([[2, 5, 3]]))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_it_is_a_plain_checkpoint_and_comes_back(tmp_path: Path, kind: str, head: str) -> None:
    model, _ = uneven(kind, head)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    names = ("n_heads", "hidden_dim") if kind == "distilbert" else ("num_attention_heads", "intermediate_size")
    assert config["per_layer_config"] == {"0": {names[0]: 2, names[1]: 28}, "1": {names[1]: 8}}
    assert (config[names[0]], config[names[1]], config["head_dim"]) == (4, 32, 4) and "sparsebert" not in config
    weights = load_file(tmp_path / "model.safetensors")
    assert not any("values" in name or "layout" in name for name in weights)
    again = AutoSparseModel.from_pretrained(tmp_path)
    assert same(again, model) and widths_of(base_of(again)) == widths_of(base_of(model))
    assert again.config.is_heterogeneous and again.config.per_layer_config[1].to_dict()[names[1]] == 8
    # Under the name that it has, it saves as itself once more, now with the section.
    again.save_pretrained(tmp_path / "again")
    assert same(AutoSparseModel.from_pretrained(tmp_path / "again"), model)


def test_it_can_be_sparse_as_well_and_skip_padding(tmp_path: Path) -> None:
    model, _ = uneven(head="ForSequenceClassification")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layer." in name and parameter.dim() == 2:
                parameter *= torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    sparsify(model, format="unstructured", include="*.layer.*")
    model.save_pretrained(tmp_path)
    again = AutoSparseModel.from_pretrained(tmp_path, verify=True)
    assert same(again, model) and len(again.sparsification) == 12
    torch.testing.assert_close(outputs(padding_free(again))[0], outputs(model)[0], rtol=1e-4, atol=1e-4)


def test_a_task_model_can_be_uneven(tmp_path: Path) -> None:
    base = tiny.base()
    prune(base)
    model = TaskModel(base, "classification", 2, head_width=6, seed=0).eval()
    before = outputs(model)
    remove_structure(model)
    torch.testing.assert_close(outputs(model), before, rtol=1e-5, atol=1e-5)
    save_sparse(model, tmp_path)
    assert same(AutoSparseModel.from_pretrained(tmp_path), model)


def test_equally_many_neurons_are_no_uneven_width(tmp_path: Path) -> None:
    model = transformers.BertModel(tiny.config()).eval()
    prune(model, (([], [0, 1]), ([], [4, 9])))
    remove_structure(model)
    assert model.config.intermediate_size == 30 and not model.config.is_heterogeneous
    # Transformers itself can load that.
    model.save_pretrained(tmp_path)
    assert same(transformers.BertModel.from_pretrained(tmp_path), model)


def test_nothing_to_remove_and_everything(tmp_path: Path) -> None:
    model = transformers.BertModel(tiny.config()).eval()
    prune(model, ())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    remove_structure(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.config.is_heterogeneous and not hasattr(model.config, "head_dim")
    prune(model, (([0, 1, 2, 3], list(range(32))), ([0], [])))
    expected = outputs(model)
    remove_structure(model)
    assert widths_of(model) == [(1, 1), (3, 32)]
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)
    # Once more takes nothing and says the same.
    written = model.config.to_dict()["per_layer_config"]
    assert remove_structure(model).config.to_dict()["per_layer_config"] == written
    model.save_pretrained(tmp_path)
    assert same(AutoSparseModel.from_pretrained(tmp_path), model)


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected an nn\.Module, got dict"):
        remove_structure({})  # type: ignore[type-var]
    with pytest.raises(UserError, match="expected a bert, roberta, distilbert model or a module that holds one"):
        remove_structure(nn.Linear(2, 2))
    model = transformers.BertModel(tiny.config()).eval()
    prune(model)
    sparsify(model, format="unstructured", include="*.0.*")
    with pytest.raises(UserError, match=r"layer 0: query is a SparseLinear.*call remove_structure before sparsify"):
        remove_structure(model)
    with pytest.raises(UserError, match="load its weights first"):
        remove_structure(transformers.BertModel(tiny.config()).to("meta"))
