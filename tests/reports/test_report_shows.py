"""Masks, models and packs in a notebook and through rich."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from reports.pages import Page
from rich.console import Console
from torch import nn

from sparsebert import AutoSparseModel, MaskPack, Masks, remove_structure, save_sparse, sparsify
from sparsebert.models.prunable import prunable_matrices
from sparsebert.models.task_model import TaskModel
from sparsebert.nn.sparsification import Sparsification
from sparsebert.patterns import parse_pattern


def on_a_terminal(thing: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(thing)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def in_a_notebook(thing: Any) -> Page:
    return Page(f"<html>{thing._repr_html_()}</html>")


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "neurons", "heads"])
def test_masks_by_layer_and_component(pattern: str) -> None:
    base, chosen = tiny.base(), parse_pattern(pattern)
    masks = Masks(base, prunable_matrices(base), chosen, torch.float32)
    masks.select(masks.magnitude(), 0.5, "global")
    dense = masks.dense()
    for matrix in masks.matrices:
        if matrix.name in dense:
            share = float(dense[matrix.name].float().mean())
            assert masks.kept()[matrix.layer, matrix.component] == pytest.approx(share)
    assert len(masks.kept()) == len(dense)
    shown = in_a_notebook(masks)
    assert shown.captions[0].startswith("masks: 50.00% of the units pruned")
    assert [row[0] for row in shown.rows] == ["layer", "1", "2"]
    said = " ".join(on_a_terminal(masks).split())
    assert "50.00% of the units pruned" in said and "layer" in said


def test_a_task_model_in_a_few_words() -> None:
    model = TaskModel(tiny.base(), "classification", 2, label_names=("<bad>", "[good]"))
    shown = in_a_notebook(model)
    assert ["base", "bert, 2 layers, width 16, 4 heads"] in shown.rows
    assert ["task", "classification: <bad>, [good]"] in shown.rows
    assert "<bad>, [good]" in on_a_terminal(model)


def test_what_sparsify_did() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    with torch.no_grad():
        model[0].weight[::2] = 0.0
    report = sparsify(model, format="unstructured").sparsification
    shown = in_a_notebook(report)
    assert shown.captions == [f"{len(report.replaced)} of 2 layers replaced; " + str(report).rsplit("; ", 1)[1]]
    assert [row[0] for row in shown.rows] == ["layer", "0", "1"] and shown.rows[1][1] == "64x64"
    assert "64x64" in on_a_terminal(report)


def test_a_pack_of_tasks(tmp_path: Path) -> None:
    shop = tiny.Workshop(tmp_path)
    outcome = shop.run("adapt_prune", "--untouched", "false", steps=1)
    pack = MaskPack.create(tmp_path / "pack", shop.model)
    pack.add(outcome.folder, "films")
    pack.switch("films")
    size = sum(mask.numel() // 8 for mask in outcome.masks.values())
    assert in_a_notebook(pack).rows[1] == ["films", "classification", "0, 1", f"{size:,}", "running"]
    assert "films" in on_a_terminal(pack)


@pytest.mark.parametrize("task", [True, False])
def test_a_sparse_model_and_what_its_layers_are_stored_in(tmp_path: Path, task: bool) -> None:
    base = tiny.base()
    for matrix in prunable_matrices(base):
        base.get_submodule(matrix.name).weight.data[::2] = 0  # type: ignore[operator, index]
    whole = TaskModel(base, "classification", 2) if task else base
    sparsify(base, format="unstructured", include="*.layer.*")
    save_sparse(whole, tmp_path, pattern="unstructured", base_model="some<base>")
    model = AutoSparseModel.from_pretrained(tmp_path)
    shown = in_a_notebook(model)
    assert shown.captions == [type(whole).__name__, "linear layers"]
    assert ["base" if task else "model", "bert, 2 layers, width 16, 4 heads"] in shown.rows
    assert ["pattern", "unstructured"] in shown.rows and ["made from", "some<base>"] in shown.rows
    after = sum(record.bytes_after for record in model.sparsification)
    dense = 4 * (4 * 16 * 16 + 2 * 16 * 32)
    assert ["1", "6", "50.0%", "6 unstructured", f"{dense:,}", f"{after // 2:,}"] in shown.rows
    assert ["all", "12", "50.0%", "12 unstructured", f"{2 * dense:,}", f"{after:,}"] in shown.rows
    tensors = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert ["all tensors", f"{tensors:,} bytes, dense {tensors + 2 * dense - after:,}"] in shown.rows
    said = on_a_terminal(model)
    assert "12 unstructured" in said and "some<base>" in said
    # A module's own repr stays, and a copy shows the copy.
    assert repr(model).startswith(type(whole).__name__ + "(\n")
    twin = copy.deepcopy(model)
    twin.sparsification = Sparsification(())
    assert "12 unstructured" not in on_a_terminal(twin) and "12 unstructured" in on_a_terminal(model)


def test_a_loaded_model_without_sparse_layers(tmp_path: Path) -> None:
    base = tiny.base()
    base.get_submodule("encoder.layer.0.intermediate.dense").weight.data[:8] = 0  # type: ignore[operator, index]
    remove_structure(base).save_pretrained(tmp_path)
    shown = in_a_notebook(AutoSparseModel.from_pretrained(tmp_path))
    assert shown.captions == ["BertModel"]
    assert ["all tensors", f"{sum(tensor.nbytes for tensor in base.state_dict().values()):,} bytes"] in shown.rows
