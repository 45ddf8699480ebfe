"""`python -m sparsebert.analyze`: what it makes, writes, says and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny

from sparsebert.analyze import main
from sparsebert.training.quiet import quiet

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = ("--max-samples", "8", "--seeds", "0", "--head-steps", "3")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two runs: `sparse` and `dense`."""
    quiet()
    folder = tmp_path_factory.mktemp("workshop")
    workshop = tiny.Workshop(folder)
    runs = folder / "runs"
    quick = ("--untouched", "false", "--head", "linear", "--sparsity", "0.5", "--output", str(runs / "sparse"))
    for command in (
        workshop.command("adapt_prune", *quick, steps=3),
        workshop.command("finetune", "--head", "linear", "--output", str(runs / "dense"), steps=1),
    ):
        from sparsebert.train import main as train

        assert train(command) == 0
    return runs


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy, to be written into."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def report_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "analysis.json").read_text(encoding="utf-8")))


def test_all_that_fits_one_run_and_trains_nothing(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs / "sparse"), *FEW]) == 0
    said, report = capsys.readouterr().out, report_of(runs / "sparse")
    assert report["schema"] == 1
    assert [run["label"] for run in report["runs"]] == ["sparse"]
    assert report["runs"][0]["method"] == "adapt_prune" and report["runs"][0]["sparsity"] == 0.5
    assert list(report["analyses"]) == ["sparsity", "similarity", "recovery", "flatness"]
    assert set(report["left_out"]) == {"pretraining", "curves", "scarcity", "layers", "shuffle", "reinit"}
    assert "--what shuffle" in report["left_out"]["shuffle"] and "2 runs" in report["left_out"]["scarcity"]
    for name, about in report["analyses"].items():
        assert set(about) == {"data", "tables", "runs", "date", "command"}
        assert about["runs"] == ["sparse"] and about["command"].startswith("python -m sparsebert.analyze sparse --max")
        for table in about["tables"]:
            assert table["title"] in said, name
            assert all(len(row) == len(table["heads"]) for row in table["rows"])
    assert str(runs) not in json.dumps(report), "where it lies on this machine is nobody else's business"


def test_a_dense_run_among_others_is_left_out_where_it_does_not_fit(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(runs), *FEW]) == 0
    report = report_of(runs)
    assert [run["label"] for run in report["runs"]] == ["dense", "sparse"]
    assert report["analyses"]["sparsity"]["runs"] == ["sparse"]
    assert report["analyses"]["flatness"]["runs"] == ["dense", "sparse"]
    assert report["left_out"]["sparsity"] == "dense: its method, finetune, prunes nothing"
    assert report["left_out"]["curves"].startswith("every run: nothing was watched")
    assert f"written: {runs / 'analysis.json'}" in capsys.readouterr().out
    assert not (runs / "sparse" / "analysis.json").exists()


def test_what_was_made_before_of_the_same_runs_stays(runs: Path) -> None:
    folder = runs / "sparse"
    assert main([str(folder), *FEW, "--what", "sparsity,recovery"]) == 0
    assert main([str(folder), *FEW, "--what", "shuffle", "recovery"]) == 0
    assert list(report_of(folder)["analyses"]) == ["sparsity", "recovery", "shuffle"]
    assert main([str(folder), *FEW]) == 0
    report = report_of(folder)
    assert "shuffle" in report["analyses"] and "shuffle" not in report["left_out"]
    assert "reinit" in report["left_out"]
    assert main([str(runs / "dense"), *FEW, "--what", "flatness", "--output", str(folder)]) == 0
    assert list(report_of(folder)["analyses"]) == ["flatness"], "of other runs"


def test_the_report_as_json_and_somewhere_else(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(runs / "sparse"), "--what", "reinit", *FEW, "--output", str(runs / "new" / "place"), "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == report_of(runs / "new" / "place")
    assert not (runs / "sparse" / "analysis.json").exists()


def test_runs_of_two_folders_need_an_output(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copytree(runs / "sparse", tmp_path / "elsewhere" / "sparse"))
    assert main([str(runs / "sparse"), str(other), "--what", "similarity"]) == 0
    said = capsys.readouterr().out
    assert "not written; give --output" in said
    (line,) = [line for line in said.splitlines() if line.startswith("runs/sparse | elsewhere/sparse")]
    assert line.split()[3] == "1.0000", "a copy is as like as can be"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("dense", "--what", "sparsity"), "sparsity: cannot be made: dense: its method, finetune, prunes nothing"),
        (("sparse", "dense", "--what", "recovery"), "recovery: cannot be made: dense: its method"),
        (("sparse", "--what", "similarities"), "unknown analysis 'similarities'"),
        (("sparse", "--what", "scarcity"), "it takes 2 runs or more"),
        (("sparse", "--what", "layers"), "it had no teacher"),
        (("sparse", "--what", "sparsity", "layers"), "layers: cannot be made: sparse: it had no teacher"),
        (("sparse", "--what", "flatness", "--data-dir", "nowhere"), "flatness: sparse: "),
        (("nowhere",), "nowhere: no such folder"),
        (("sparse", "--max-samples", "0"), "max_samples: expected at least 1, got 0"),
        (("sparse", "--seeds", "1", "1"), "seeds: expected different numbers"),
        (("sparse", "--whta", "x"), "--help says how"),
        ((), "the following arguments are required: RUN"),
    ],
)
def test_what_is_refused(
    trained: Path, words: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(trained / word) if word in ("sparse", "dense", "nowhere") else word for word in words]
    assert main(folders) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and complaint in error, error
    assert not (trained / "sparse" / "analysis.json").exists()


def test_help_names_every_analysis(capsys: pytest.CaptureFixture[str]) -> None:
    from sparsebert.reports.analysis import ANALYSES

    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    for name, analysis in ANALYSES.items():
        assert f"{name:12} {analysis.summary}" in said
