"""Reading finished runs: what a record holds, labels, and what is refused."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from reports.finished import finished
from rich.console import Console
from tiny import Workshop

from sparsebert.errors import UserError
from sparsebert.reports.runs import find_runs, read_run, read_runs


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices take longer on several threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_trained_run_is_read(tmp_path: Path) -> None:
    words = ("--untouched", "false", "--head", "linear", "--masked", "encoder", "pooler")
    outcome = Workshop(tmp_path).run("magnitude", *words, steps=1)
    run = read_run(outcome.folder)
    assert run.result == outcome.result and run.metrics == outcome.log
    assert run.config["run"]["method"] == "magnitude" and run.pruned and len(run.base) == 64
    assert run.masks().keys() == outcome.masks.keys()
    assert all(torch.equal(mask, outcome.masks[name]) for name, mask in run.masks().items())
    matrix = run.matrices["encoder.layer.1.attention.self.key"]
    assert (matrix.component, matrix.layer, matrix.heads, matrix.shape) == ("key", 1, 4, (16, 16))
    assert run.benchmark is None and run.analysis is None
    (run.folder / "benchmark.json").write_text('{"schema": 1}', encoding="utf-8")
    assert read_run(run.folder).benchmark == {"schema": 1}


def test_it_shows_itself_in_a_terminal_and_in_a_notebook(tmp_path: Path) -> None:
    run = finished(tmp_path / "run<1>[b]", metric="f1", score=0.5)
    console = Console(file=io.StringIO(), width=200)
    console.print(run)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "run<1>[b]" in said and "tamt, unstructured, target 50.0%" in said and "0.5000" in said
    html = run._repr_html_()
    assert "<caption>run&lt;1&gt;[b]</caption>" in html and "tamt, unstructured, target 50.0%" in html
    assert "somewhere" not in html and "score" not in repr(run) and "f1 0.5000" in repr(run)


def test_runs_of_a_folder_each_once_and_told_apart(tmp_path: Path) -> None:
    for name in ("a/one", "a/two", "b/one"):
        finished(tmp_path / name)
    runs = read_runs([tmp_path / "a", tmp_path / "a" / "one", tmp_path / "b" / "one"])
    assert [run.label for run in runs] == ["a/one", "two", "b/one"]
    assert find_runs(tmp_path) == [tmp_path / "a" / "one", tmp_path / "a" / "two", tmp_path / "b" / "one"]
    assert read_run(tmp_path / "a" / "one").label == "one"


def test_a_line_of_the_log_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", [{"phase": "train", "step": 1, "loss": 0.5}])
    with run.files.metrics.open("a") as file:
        file.write('{"phase": "tr')
    assert run.metrics == [{"phase": "train", "step": 1, "loss": 0.5}]


def test_what_is_no_finished_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no finished run"):
        find_runs(tmp_path)
    folder = finished(tmp_path / "run").folder
    (folder / "result.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"result\.json: damaged"):
        read_run(folder)
    (folder / "result.json").write_text('{"method": "tamt"}', encoding="utf-8")
    with pytest.raises(UserError, match="expected 'task' to be str"):
        read_run(folder)
    (folder / "result.json").unlink()
    for read in (read_run, find_runs):
        with pytest.raises(UserError, match=r"not finished.*--resume"):
            read(folder)
