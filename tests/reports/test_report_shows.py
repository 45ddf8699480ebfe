"""Masks, models and packs in a notebook and through rich."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from reports.pages import Page
from rich.console import Console
from torch import nn

from sparsebert import MaskPack, Masks, sparsify
from sparsebert.models.prunable import prunable_matrices
from sparsebert.models.task_model import TaskModel
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
