"""What is seen: lines in a pipe, a bar on a terminal."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest
from tiny import Workshop

from sparsebert.train import main
from sparsebert.training.table import plain_table

SHORT = ["--untouched", "false", "--head", "linear"]


class Terminal(io.StringIO):
    """A standard output that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_line_for_every_logging_step_in_a_pipe(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--logging-steps", "2", "--eval-strategy", "steps", "--eval-steps", "3"]
    run = workshop.run("adapt_prune", *SHORT, *words, steps=4)
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    trained = [line for line in lines if line.startswith("prune  ")]
    assert [line.split()[1] for line in trained] == ["2/4", "3/4", "4/4", "4/4"]
    for line in (trained[0], trained[2]):
        assert re.fullmatch(r"prune  \d/4  loss \d\.\d{4}  sparsity 0\.\d{4}  \d+ s", line)
    assert "eval_loss" in trained[1] and "eval_accuracy" in trained[1] and "runtime" not in trained[1]
    table = captured.out[captured.out.index("method ") :]
    for said in (
        "adapt_prune, unstructured, target 50.0%",
        "sparsity, whole model",
        "sparsity, encoder",
        "masks",
        "bytes",
    ):
        assert said in table
    assert str(run.folder) in table and f"{run.result['score']:.4f}" in table
    assert captured.err == ""
    assert "\x1b" not in captured.out


def test_a_bar_on_a_terminal(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    assert main(workshop.command("adapt_prune", "--head", "linear", "--untouched", "true", steps=3)) == 0
    said = terminal.getvalue()
    assert "\x1b[" in said and "3/3" in said and "untouched" in said and "scoring" in said
    assert not re.search(r"^prune  \d/3", said, flags=re.M)
    assert "┃" in said or "│" in said


def test_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plain_table([("a", "1"), ("long", "2")]) == "a     1\nlong  2"


def test_the_log_is_json(workshop: Workshop) -> None:
    run = workshop.run("finetune", *SHORT[2:], steps=2)
    for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
