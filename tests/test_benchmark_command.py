"""`python -m sparsebert.benchmark`: what it writes, what it says, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from sparsebert.benchmark import main
from sparsebert.nn import remember
from sparsebert.reports import measure as measuring

QUICK = ("--repeats", "1", "--threads", "1", "--batch-sizes", "2", "--precisions", "fp32", "--no-memory", "--against")


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """One thread, and no measured choice in the user's own file."""
    monkeypatch.setattr(remember, "path", lambda: tmp_path / "choices.json")


@pytest.fixture(scope="module")
def run(workshop: tiny.Workshop) -> Path:
    """The folder of a finished run."""
    words = ("--untouched", "false", "--head", "linear", "--sparsity", "0.8")
    return workshop.run("magnitude", *words, steps=2).folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be written into."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def report_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "benchmark.json").read_text(encoding="utf-8")))


def test_a_run_is_measured_and_the_report_lies_beside_its_model(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(copy), *QUICK, "--score", "--no-what-if"]) == 0
    said = capsys.readouterr().out
    report = report_of(copy)
    assert report["schema"] == 1
    assert report["subject"] == {
        "where": copy.name,
        "model_type": "bert",
        "output": "task",
        "pattern": "unstructured",
        "sparsity": pytest.approx(0.8, abs=1e-3),
        "imposed": False,
    }
    conditions = report["conditions"]
    assert {"date", "command", "device", "hardware", "versions", "threads", "repeats", "seed"} <= set(conditions)
    assert conditions["threads"] == 1 and conditions["command"].endswith("--no-what-if")
    assert str(copy.parent) not in json.dumps(report), "where it lies on this machine is nobody else's business"
    assert conditions["lengths"] == {"source": "validation set of custom, 16 inputs"}
    full, real = report["cases"]
    assert (full["kind"], full["lengths"], full["tokens"]) == ("full", [20, 20], 40)
    assert (real["kind"], real["lengths"], real["width"]) == ("real", [6, 6], 6)
    for case in report["cases"]:
        names = [row["variant"] for row in case["rows"]]
        assert {"torch fp32", "padding-free fp32", "unstructured fp32", "auto fp32"} <= set(names)
        for row in case["rows"]:
            assert row["status"] == "ok" and row["low_ms"] <= row["p50_ms"] <= row["p90_ms"] <= row["high_ms"]
            assert row["rounds"] == 1 and row["sentences_per_second"] > 0 and row["tokens_per_second"] > 0
        assert case["best_dense"] in names and case["best_subnetwork"] in names and case["verdict"] in said
    accuracy = report["accuracy"]
    saved = json.loads((copy / "result.json").read_text(encoding="utf-8"))
    assert (accuracy["metric"], accuracy["score"]) == ("accuracy", saved["score"])
    # In fp32 every variant decides as the run's own evaluation did.
    assert {metrics["accuracy"] for metrics in accuracy["scores"].values()} == {saved["score"]}
    assert sum(len(row["layers"]) for row in report["layers"]) == 12 * len({full["tokens"], real["tokens"]})
    stored = {variant["variant"]: variant for variant in report["variants"]}
    assert stored["unstructured fp32"]["layers"] == {"unstructured": 12}
    assert stored["unstructured fp32"]["weights"]["total"] < stored["torch fp32"]["weights"]["total"]
    assert "memory" not in stored["torch fp32"]
    text = (copy / "benchmark.md").read_text(encoding="utf-8")
    assert text.startswith("# benchmark\n") and full["verdict"] in text and "## layer by layer" in text
    assert "hardware: cpu" in text and "| unstructured fp32 |" in text


def test_other_patterns_and_break_evens(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--lengths", "full", "--seq-lens", "8", "--formats", "unstructured", "--what-if", "--break-even")
    assert main([str(copy), *QUICK, *words, "--output", str(tmp_path / "elsewhere")]) == 0
    report = report_of(tmp_path / "elsewhere")
    assert not (copy / "benchmark.json").exists()
    tried = {(row["pattern"], row["sparsity"]) for row in report["what_if"]}
    assert {("unstructured", 0.8), ("unstructured", 0.9), ("block:8x1", 0.8), ("2:4", 0.5), ("neurons", 0.9)} <= tried
    for row in report["what_if"]:
        assert "reason" in row or row["speedup"] == pytest.approx(row["dense_ms"] / row["p50_ms"], rel=0.02)
    assert {tuple(row["shape"]) for row in report["break_even"]} == {(16, 16), (32, 16), (16, 32)}
    said = capsys.readouterr().out
    assert "what if: other patterns" in said and "breaks even at" in said and "written:" in said


def test_a_model_is_pruned_for_speed_alone(workshop: tiny.Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--lengths", "real", "--seq-lens", "8", "--formats", "blocks:8x1", "unstructured", "--no-what-if")
    before = sorted(workshop.model.iterdir())
    assert main([str(workshop.model), *QUICK, *words, "--pattern", "block:8x1", "--sparsity", "0.75", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["subject"]["imposed"] and report["subject"]["sparsity"] == 0.75 and report["accuracy"] == {}
    assert report["subject"]["output"] == "last hidden state"
    assert "SST-2" in report["conditions"]["lengths"]["source"]
    assert sorted(workshop.model.iterdir()) == before, "a checkpoint's folder is the user's"
    assert {"blocks:8x1 fp32", "unstructured fp32"} <= {row["variant"] for row in report["cases"][0]["rows"]}


def test_a_dense_model_has_nothing_to_compare(workshop: tiny.Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(workshop.model), *QUICK, "--lengths", "full", "--seq-lens", "4"]) == 0
    said = capsys.readouterr().out
    assert "2 x 4: nothing is pruned; the best dense path is" in said and "not written" in said


def test_boxes_on_a_terminal(
    workshop: tiny.Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "160")
    words = ("--sparsity", "0.9", "--lengths", "full", "--no-what-if", "--formats", "unstructured,auto")
    assert main([str(workshop.model), *QUICK, *words]) == 0
    said = capsys.readouterr().out
    assert "to measure speed alone" in said and "┃" in said and "unstructured fp32" in said and "auto fp32" in said


def test_a_wrong_output_has_no_speed(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = measuring.build

    def wrong(variant: Any, *given: Any) -> Any:
        model, layers = right(variant, *given)
        if variant.kind == "subnetwork":
            model.register_forward_hook(lambda module, inputs, output: output + 1)
        return model, layers

    monkeypatch.setattr(measuring, "build", wrong)
    words = ("--lengths", "full", "--formats", "unstructured", "--no-what-if")
    assert main([str(copy), *QUICK, *words]) == 0
    said = capsys.readouterr().out
    (case,) = report_of(copy)["cases"]
    (row,) = [row for row in case["rows"] if row["kind"] == "subnetwork"]
    assert row["status"] == "failed" and "p50_ms" not in row and case["speedup"] is None
    assert "failed, no speed is given: its outputs are off by" in said
    assert "no subnetwork gave right outputs" in said


def test_data_that_are_not_at_hand(copy: Path, workshop: tiny.Workshop, tmp_path: Path) -> None:
    words = ("--data-dir", str(tmp_path / "gone"), "--lengths", "real", "--formats", "unstructured", "--no-what-if")
    assert main([str(copy), *QUICK, *words]) == 0
    lengths = report_of(copy)["conditions"]["lengths"]
    assert "SST-2" in lengths["source"] and "not at hand" in lengths["note"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--formats", "block:8x2"], "did you mean 'blocks'"),
        (["--formats", "dense"], "formats"),
        (["--against", "tensorrt"], "'tensorrt'"),
        (["--seq-lens", "21"], "the model takes at most 20 tokens, got 21"),
        (["--seq-lens", "0"], "seq-lens"),
        (["--batch-sizes", "0"], "batch-sizes"),
        (["--lengths", "long"], "'long'"),
        (["--threads", "0"], "threads: expected at least 1, got 0"),
        (["--repeats", "0"], "repeats"),
        (["--seconds-budget", "0"], "seconds-budget"),
        (["--precisions", "fp8"], "'fp8'"),
        (["--device", "tpu"], "'tpu'"),
        (["--pattern", "2:4"], "masks of its own"),
        (["--score", "--data-dir", "nowhere"], "nowhere"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_what_cannot_be_is_refused(run: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, [str(run), *words], said)
    assert not (run / "benchmark.json").exists()


def refused(capsys: pytest.CaptureFixture[str], words: list[str], *said: str) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    last = error.strip().splitlines()[-1]
    assert last.startswith("error: "), error
    for fragment in said:
        assert fragment in last


def test_what_is_no_model_is_refused(
    workshop: tiny.Workshop, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, [], "RUN|MODEL")
    refused(capsys, [str(tmp_path / "no" / "where" / "at" / "all")], "there is no folder")
    refused(capsys, [str(workshop.model), "--score"], "is no run")
    refused(capsys, [str(workshop.model), "--pattern", "blok"], "'blok'")
    refused(capsys, [str(workshop.model), "--sparsity", "1.5"], "1.5")
    (tmp_path / "file").write_text("", encoding="utf-8")
    refused(capsys, [str(copy), "--output", str(tmp_path / "file")], str(tmp_path / "file"))
    (copy / "result.json").write_text("[]", encoding="utf-8")
    refused(capsys, [str(copy)], "result.json", "damaged")
    shutil.rmtree(copy / "model")
    refused(capsys, [str(copy)], "not finished", "--resume")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_refused_where_there_is_none(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, [str(run), "--device", "cuda"], "device cuda", "--device cpu")


def test_a_package_that_is_not_installed_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparsebert.reports import against

    monkeypatch.setitem(against.AGAINST, "openvino", (("no_such_package",), ("fp32",)))
    refused(capsys, [str(run), "--against", "openvino"], "openvino", "pip install no_such_package")
