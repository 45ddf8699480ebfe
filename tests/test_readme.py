"""Every snippet of the README runs: what installs is run whole by CI, everything else here on a few examples."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from snippets import ROOT, check_lines, commands, needs_demo, run_command, run_python, snippets

SNIPPETS = snippets(ROOT / "README.md")
# The newcomer's path is run as it stands, one snippet after the other.
NEWCOMER = [snippet for snippet in SNIPPETS if snippet.name.startswith("newcomer-")]
OTHERS = [snippet for snippet in SNIPPETS if snippet not in NEWCOMER]
SMALL = ["--max-steps", "3", "--max-train-samples", "64", "--max-eval-samples", "32"]
TRAINING = [arguments for module, arguments in commands(OTHERS) if module == "sparsebert.train"]


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder; no measured choice goes into the user's own file."""
    from sparsebert.nn import remember

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(remember, "path", lambda: tmp_path / "choices.json")
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def test_ci_finds_its_two_commands() -> None:
    named = {snippet.name: snippet.text for snippet in SNIPPETS if snippet.language == "bash" and snippet.name}
    assert "pip install torch==2.13.0" in named["main-job"]
    assert "python -m sparsebert.train --method adapt_prune" in named["main-job"]
    assert "pip install torch==2.13.0" in named["test-command"]
    assert re.search(r"\bpytest\b", named["test-command"])


def test_every_shell_snippet_is_known() -> None:
    """A line that no test runs does not slip into the README."""
    check_lines(SNIPPETS)


@needs_demo
@pytest.mark.parametrize("arguments", TRAINING, ids=" ".join)
def test_train_commands_run(arguments: list[str], apart: Path) -> None:
    if "--data-dir" in arguments or "--resume" in arguments or "--config" in arguments:
        pytest.skip("names files of the reader's own; the same flags are tested in tests/training")
    run_command("sparsebert.train", [*arguments, *SMALL])
    assert list(apart.glob("**/result.json"))


@needs_demo
def test_the_newcomers_path_runs_snippet_by_snippet(apart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train, evaluate, benchmark, report, load in Python: in this order, each on what those before it have left."""
    path = ["train", "evaluate", "benchmark", "report", "load"]
    assert [snippet.name for snippet in NEWCOMER] == [f"newcomer-{step}" for step in path]
    for step, snippet in zip(path[:-1], NEWCOMER, strict=False):
        ((module, arguments),) = commands([snippet])
        assert module == f"sparsebert.{step}"
        run_command(module, arguments)
    assert "the same to the last digit" in capsys.readouterr().out
    run = apart / "runs" / "first"
    for name in ("result.json", "benchmark.json", "benchmark.md", "model/model.safetensors"):
        assert (run / name).is_file(), name
    assert "<html" in (apart / "report.html").read_text(encoding="utf-8")
    names = run_python(NEWCOMER, "README.md")
    assert names["logits"].shape == (2, 2) and bool(names["logits"].isfinite().all())


@needs_demo
def test_python_snippets_run(apart: Path) -> None:
    """All other Python snippets in order, in one namespace, as a reader would paste them."""
    run_python(OTHERS, "README.md")


def test_info_command_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in [arguments for module, arguments in commands(SNIPPETS) if module == "sparsebert.info"] or [[]]:
        run_command("sparsebert.info", arguments)
    assert "select_mask" in capsys.readouterr().out
