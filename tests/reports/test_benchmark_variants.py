"""The ways to run a model: which formats fit its masks, that every one computes the same, and what it stores."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import BertForSequenceClassification

from sparsebert.models.sparse_folder import save_sparse
from sparsebert.models.storage import save_model
from sparsebert.models.task_model import TaskModel
from sparsebert.nn import remember, sparsify
from sparsebert.reports import against, memory
from sparsebert.reports.against import plan_against, prepare
from sparsebert.reports.compare import disagreement
from sparsebert.reports.inputs import cases
from sparsebert.reports.layers import Clock, break_even, layer_rows
from sparsebert.reports.memory import memory_of
from sparsebert.reports.subject import Readout, Subject, load_subject
from sparsebert.reports.timing import STOPWATCHES
from sparsebert.reports.variants import PRECISIONS, Variant, build, formats_that_fit, in_precision, plan, weight_bytes

CPU = torch.device("cpu")
CLOCK = Clock(1, STOPWATCHES["wall"], 0.0)
BOTH = ["fp32", "bf16"]


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, and no measured choice in the user's own file."""
    monkeypatch.setattr(remember, "path", lambda: tmp_path / "choices.json")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints by kind, and a task model as a run saves it."""
    root = tmp_path_factory.mktemp("models")
    for kind in tiny.KINDS:
        tiny.save_checkpoint(root / kind, kind)
    return root


def pruned(folder: Path, pattern: str = "unstructured", sparsity: float | None = 0.8, kind: str = "bert") -> Subject:
    return load_subject(str(folder / kind), pattern, sparsity)


def batch(subject: Subject) -> dict[str, torch.Tensor]:
    config: Any = subject.readout.base.config
    (case,) = cases([3], [12], ["real"], [3, 7, 12])
    return case.inputs(int(config.vocab_size), int(config.pad_token_id), 0, CPU)


@pytest.mark.parametrize(
    ("pattern", "sparsity", "precision", "fits", "not_fits"),
    [
        ("unstructured", 0.8, "fp32", {"unstructured"}, {"compact"}),
        ("unstructured", 0.2, "fp32", set(), {"unstructured"}),
        ("block:8x1", 0.75, "fp32", {"unstructured", "blocks:8x1"}, set()),
        ("block:8x2", 0.75, "bf16", {"unstructured", "blocks:8x2", "blocks:4x2"}, set()),
        ("2:4", 0.5, "fp32", {"unstructured", "semi_structured:2:4"}, set()),
        ("neurons", 0.75, "fp32", {"compact"}, {"semi_structured:2:4"}),
        ("heads", 0.5, "fp32", {"compact"}, set()),
    ],
)
def test_formats_that_fit(
    folder: Path, pattern: str, sparsity: float, precision: str, fits: set[str], not_fits: set[str]
) -> None:
    fit, why_not = formats_that_fit(pruned(folder, pattern, sparsity).readout, PRECISIONS[precision])
    assert fits <= set(fit) and not not_fits & set(fit)
    assert not set(fit) & set(why_not)
    assert all(name.startswith("model.encoder.layer.") for names in fit.values() for name in names)


def test_a_model_without_zeros_has_dense_variants_alone(folder: Path) -> None:
    subject = load_subject(str(folder / "bert"))
    assert subject.sparsity == 0.0 and len(subject.matrices) == 12
    found = plan(subject.readout, None, BOTH, CPU)
    assert {variant.kind for variant in found.variants} == {"dense"} and not found.left_out
    assert not plan(subject.readout, ["auto"], BOTH, CPU).layers


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("pattern", ["unstructured", "block:8x2", "neurons"])
def test_every_variant_computes_what_the_dense_masked_model_does(folder: Path, kind: str, pattern: str) -> None:
    subject = pruned(folder, pattern, 0.75, kind)
    inputs = batch(subject)
    mask = inputs["attention_mask"].bool()
    found = plan(subject.readout, None, BOTH, CPU)
    masters = {precision: in_precision(subject.readout, precision) for precision in BOTH}
    before = {name: tensor.clone() for name, tensor in subject.readout.state_dict().items()}
    with torch.inference_mode():
        exact = subject.readout(**inputs)
    assert {"torch fp32", "padding-free bf16", "auto bf16"} <= {variant.name for variant in found.variants}
    for variant in found.variants:
        model, layers = build(variant, masters[variant.precision], found.layers.get(variant.name), (8,))
        with torch.inference_mode():
            assert disagreement(model(**inputs), exact, variant.precision, mask=mask) is None, variant.name
        again, _ = build(variant, masters[variant.precision], layers)
        assert weight_bytes(again) == weight_bytes(model)
    after = subject.readout.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_formats_that_are_asked_for(folder: Path) -> None:
    subject = pruned(folder, "block:4x4", 0.75)
    found = plan(subject.readout, ["blocks:4x4", "semi_structured:2:4"], ["fp32"], CPU)
    names = [variant.name for variant in found.variants if variant.kind == "subnetwork"]
    assert names == ["blocks:4x4 fp32"] and list(found.left_out) == ["semi_structured:2:4 fp32"]
    with pytest.raises(ValueError, match="did you mean 'blocks'"):
        plan(subject.readout, ["block:4x4"], ["fp32"], CPU)
    with pytest.raises(ValueError, match="dense"):
        plan(subject.readout, ["dense"], ["fp32"], CPU)


def test_weights_are_counted_as_they_are_stored(folder: Path) -> None:
    subject = pruned(folder, "block:8x2", 0.75)
    masters = {precision: in_precision(subject.readout, precision) for precision in BOTH}
    found = plan(subject.readout, ["blocks:8x2"], ["bf16"], CPU)
    sizes = {}
    for variant in found.variants:
        model, _ = build(variant, masters["bf16"], found.layers.get(variant.name, {}))
        sizes[variant.name] = weight_bytes(model)
    dense, sparse = sizes["torch bf16"], sizes["blocks:8x2 bf16"]
    weights = sum(matrix.shape[0] * matrix.shape[1] for matrix in subject.matrices)
    assert dense["total"] - sparse["total"] == dense["linears"] - sparse["linears"] > 0
    assert dense["linears"] >= 2 * weights
    assert dense["total"] == sum(tensor.numel() * 2 for tensor in masters["bf16"].parameters()) + _buffers(masters)


def _buffers(masters: dict[str, Readout]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in masters["bf16"].buffers())


@pytest.mark.parametrize("head", ["mlp", "linear"])
@pytest.mark.parametrize("kind", ["classification", "span"])
def test_a_saved_task_model_is_measured_by_its_logits(folder: Path, tmp_path: Path, head: str, kind: str) -> None:
    model = TaskModel(
        tiny.base(), kind, 2, head=head, head_width=8, seed=0, label_names=("a", "b") if kind[0] == "c" else ()
    )
    mask = torch.ones(16, 16, dtype=torch.bool)
    mask[:, ::2] = False
    masks = {f"encoder.layer.{layer}.attention.self.query": mask for layer in (0, 1)}
    save_model(tmp_path / "model", model, tiny.tokenizer(), masks=masks, pattern="unstructured", info={})
    subject = load_subject(str(tmp_path / "model"))
    assert (subject.sparsity, subject.pattern, len(subject.matrices)) == (0.5, "unstructured", 2)
    inputs = batch(subject)
    count = inputs["attention_mask"].bool() if subject.readout.per_token else None
    with torch.inference_mode():
        exact = subject.readout(**inputs)
        assert exact.shape == ((*inputs["input_ids"].shape, 2) if kind == "span" else (3, 2))
        for way, precision in (("unstructured", "fp32"), ("unstructured", "bf16")):
            fit, _ = formats_that_fit(subject.readout, PRECISIONS[precision])
            assert fit[way] == [f"model.base.{name}" for name in masks]
            layers = dict.fromkeys(fit[way], way)
            twin, _ = build(Variant("subnetwork", way, precision), in_precision(subject.readout, precision), layers)
            assert disagreement(twin(**inputs), exact, precision, mask=count, own=0.1) is None
    with pytest.raises(ValueError, match="masks of its own"):
        load_subject(str(tmp_path / "model"), "unstructured")


@pytest.mark.parametrize("head", ["task", "transformers", "none"])
def test_a_sparse_folder_is_measured_as_the_model_it_holds(folder: Path, tmp_path: Path, head: str) -> None:
    subject = pruned(folder, "block:8x1", 0.75)
    base: Any = subject.readout.base
    with torch.inference_mode():
        exact = subject.readout(**batch(subject))
    model = base
    if head == "task":
        model = TaskModel(base, "classification", 2, head="linear", seed=0, label_names=("a", "b"))
    elif head == "transformers":
        model = BertForSequenceClassification(base.config)
        model.bert = base
    sparsify(model, format="blocks:8x1", include="*encoder*")
    save_sparse(model.eval(), tmp_path / "sparse", pattern="block:8x1" if head == "none" else None)
    loaded = load_subject(str(tmp_path / "sparse"))
    assert loaded.sparsity == 0.75 and loaded.pattern == ("block:8x1" if head == "none" else "unknown pattern")
    assert loaded.masks.keys() == subject.masks.keys()
    assert all(torch.equal(loaded.masks[name], mask) for name, mask in subject.masks.items())
    assert "blocks:8x1" in formats_that_fit(loaded.readout, torch.float32)[0]
    with torch.inference_mode():
        output = Readout(loaded.readout.base)(**batch(loaded))
    assert isinstance(loaded.readout.model, TaskModel) == (head == "task")
    assert disagreement(output, exact, "fp32") is None


def test_imposed_masks_are_by_magnitude_and_exact(folder: Path) -> None:
    subject = pruned(folder, "unstructured", 0.75)
    before = load_subject(str(folder / "bert")).readout.base.state_dict()
    assert subject.imposed and subject.sparsity == 0.75
    for name, mask in subject.masks.items():
        weight = before[f"{name}.weight"].abs()
        assert int((~mask).sum()) == mask.numel() * 3 // 4
        assert float(weight[~mask].max()) <= float(weight[mask].min())
        assert not bool(subject.readout.base.get_submodule(name).weight[~mask].any())


def test_software_to_measure_against(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"openvino"}
    monkeypatch.setattr(against.importlib.util, "find_spec", lambda name: name if name in found else None)
    variants, left_out = plan_against(None, BOTH, CPU)
    assert [variant.name for variant in variants] == ["openvino fp32", "openvino bf16"]
    assert "pip install onnxruntime onnx onnxscript" in left_out["onnxruntime"] and "compile" not in left_out
    assert plan_against([], BOTH, CPU) == ([], {})
    assert [variant.name for variant in plan_against(["compile"], ["fp32"], CPU)[0]] == ["compile fp32"]
    with pytest.raises(ValueError, match="onnxruntime: not installed; pip install onnxruntime"):
        plan_against(["onnxruntime"], BOTH, CPU)
    with pytest.raises(ValueError, match="'openvino'"):
        plan_against(["opnvino"], BOTH, CPU)


def test_openvino_computes_the_same(folder: Path) -> None:
    pytest.importorskip("openvino")
    subject = pruned(folder)
    inputs = batch(subject)
    with torch.inference_mode():
        run = prepare(Variant("against", "openvino", "fp32"), subject.readout, inputs)
        exact = subject.readout(**inputs)
        assert disagreement(run(), exact, "fp32", mask=inputs["attention_mask"].bool()) is None


def test_layers_are_grouped_by_shape_and_sparsity(folder: Path) -> None:
    subject = pruned(folder, "block:8x1", 0.75)
    linears: dict[str, Any] = {m.name: subject.readout.base.get_submodule(m.name) for m in subject.matrices}
    with torch.inference_mode():
        rows = layer_rows(linears, [4, 8], ["fp32"], None, CLOCK)
    assert [tuple(row["shape"]) for row in rows[::2]] == [(16, 16), (32, 16), (16, 32)]
    assert sum(len(row["layers"]) for row in rows if row["rows"] == 8) == 12
    for row in rows:
        assert {"torch fp32", "unstructured fp32", "blocks:8x1 fp32"} <= set(row["ms"])
        assert row["speedup"] == round(row["ms"][row["best_dense"]] / row["ms"][row["best"]], 3)
        assert row["sparsity"] == 0.75
    with torch.inference_mode():
        (only, *_) = layer_rows(linears, [4], ["fp32"], ["unstructured"], CLOCK)
        dense = {"x": torch.nn.Linear(16, 16).requires_grad_(False)}
        (nothing,) = layer_rows(dense, [4], ["fp32"], None, CLOCK)
    assert "blocks:8x1 fp32" not in only["ms"] and nothing["best"] is None and nothing["speedup"] is None


def test_break_evens_are_measured_where_a_sparsity_can_be_chosen() -> None:
    with torch.inference_mode():
        for pattern, format in (("unstructured", "unstructured fp32"), ("block:8x1", "blocks:8x1 fp32")):
            (row,) = break_even([(16, 16)], [4], pattern, ["fp32"], CLOCK, CPU)
            assert row["format"] == format and len(row["ms"]) == 7
        assert break_even([(16, 16)], [4], "neurons", ["fp32"], CLOCK, CPU)[0]["format"] == "compact fp32"
        assert break_even([(16, 16)], [4], "2:4", ["fp32"], CLOCK, CPU) == []
        assert break_even([(15, 16)], [4], "block:8x1", ["fp32"], CLOCK, CPU) == []


def test_memory_is_measured_in_a_process_of_its_own(folder: Path) -> None:
    job = {
        "where": str(folder / "bert"),
        "pattern": "unstructured",
        "sparsity": 0.8,
        "variant": ["subnetwork", "unstructured", "fp32"],
        "layers": {"model.encoder.layer.0.intermediate.dense": "unstructured"},
        "case": {"kind": "full", "lengths": [12], "width": 12},
        "seed": 0,
        "threads": 1,
        "device": "cpu",
    }
    found = memory_of(json.loads(json.dumps(job)))
    assert "reason" not in found, found
    assert set(found) - {"note"} == {"resident", "peak"} and all(
        isinstance(found[key], int) for key in found.keys() - {"note"}
    )


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("import sys; sys.exit('error: no such model')", "no such model"),
        ("import os; os._exit(3)", "status 3"),
        ("print('nothing')", "JSONDecodeError"),
        ("import time; time.sleep(60)", "TimeoutExpired"),
    ],
)
def test_memory_that_cannot_be_measured_is_no_error(command: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.run

    def run(words: list[str], **given: Any) -> Any:
        return real([words[0], "-c", command], **{**given, "timeout": 0.5 if "sleep" in command else 60})

    monkeypatch.setattr(memory.subprocess, "run", run)
    assert said in memory_of({"device": "cpu"})["reason"]
