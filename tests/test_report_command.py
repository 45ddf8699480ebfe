"""`python -m sparsebert.report`: the file it writes, what it refuses, and the page in a real browser."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from reports.pages import Page, measure

from sparsebert.report import main
from sparsebert.training.quiet import quiet

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two finished runs, one of them measured."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    quiet()
    shop = tiny.Workshop(tmp_path_factory.mktemp("shop"))
    words = ("--untouched", "false", "--head", "linear", "--sparsity", "0.6")
    watch = ("--eval-strategy", "steps", "--eval-steps", "1", "--watch-train")
    folder = shop.folder / "runs"
    folder.mkdir()
    for seed in ("1", "2"):
        outcome = shop.run("magnitude", *words, *watch, "--seed", seed, steps=2)
        outcome.folder.rename(folder / f"seed{seed}")
    measure(folder / "seed1", 2.0, 1.0)
    yield folder
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def report(runs: Path) -> Path:
    """The page of both."""
    out = runs.parent / "made" / "report.html"
    assert main([str(runs), "--out", str(out), "--title", "Two seeds"]) == 0
    return out


def test_the_page_of_trained_runs(runs: Path, report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    shown = Page(text)
    assert shown.headings[0] == "Two seeds" and not list(report.parent.glob("*.tmp"))
    assert any(row[0] == "magnitude" and row[2:] == ["1, 2"] for row in shown.rows)
    assert "weights kept, %, mean of 2 seeds" in shown.captions
    assert sum("share kept by layer (rows) and head (columns)" in label for label in shown.pictures) == 4
    assert {"train and dev: loss: loss by step", "loss while training: loss by step"} <= set(shown.pictures)
    assert [row[-1] for row in shown.losing] == ["0.50x slower"]
    assert "python -m sparsebert.report runs --out report.html --title 'Two seeds'" in shown.words
    assert "transformers" in shown.words and "cpu_capability" in shown.words
    assert str(runs.parent) not in text, "where it lies on this machine is nobody else's business"
    assert len(text) < 200_000


def test_one_run_and_a_folder_of_it_are_one_run(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.html"
    (tmp_path / "report.html").write_text("before", encoding="utf-8")
    assert main([str(runs / "seed1"), str(runs / "seed1"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith("1 run, ")
    assert "seed1" in out.read_text(encoding="utf-8")


def test_an_analysis_beside_the_runs_is_taken_in(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / "copy")
    (tmp_path / "copy" / "analysis.json").write_text('{"analyses": {"odd": {"number": 0.125}}}', encoding="utf-8")
    assert main([str(tmp_path / "copy"), "--out", str(tmp_path / "a.html")]) == 0
    assert ["number", "0.125"] in Page((tmp_path / "a.html").read_text(encoding="utf-8")).rows
    (tmp_path / "copy" / "analysis.json").write_text("[", encoding="utf-8")
    assert main([str(tmp_path / "copy"), "--out", str(tmp_path / "a.html")]) == 2


def test_what_is_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(runs / "seed1", unfinished)
    (unfinished / "result.json").unlink()
    (tmp_path / "file").write_text("", encoding="utf-8")
    for words, said in (
        ([str(tmp_path / "none")], "no such folder"),
        ([str(unfinished)], "is not finished"),
        ([str(runs), "--out", str(tmp_path)], "is a folder; give a file"),
        ([str(runs), "--out", str(tmp_path / "file" / "report.html")], "cannot be written"),
        ([], "--help says how"),
        ([str(runs), "--colour", "red"], "--help says how"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1, error


@pytest.mark.skipif(not BROWSER, reason="no chromium on PATH")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_it_has_no_errors_and_fits_the_screen(report: Path, tmp_path: Path, width: int) -> None:
    # In a frame of that width (a window has a least one), by a script of the test's own: the page has none.
    inner = html.escape(report.read_text(encoding="utf-8").replace("<details>", "<details open>"))
    script = "const page=document.querySelector('iframe').contentDocument.documentElement;"
    script += "document.body.dataset.page=[page.scrollWidth,page.querySelectorAll('svg').length].join()"
    frame = f'<iframe style="width:{width}px;height:900px;border:0" onload="{script}" srcdoc="{inner}"></iframe>'
    outer = tmp_path / "page.html"
    outer.write_text(f"<!DOCTYPE html><html><body>{frame}</body></html>", encoding="utf-8")
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"),
        *("--window-size=1400,900", "--enable-logging=stderr", "--v=0", "--dump-dom", outer.as_uri()),
    ]
    home = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=home, check=False)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'data-page="(\d+),(\d+)"', done.stdout)
    assert found is not None, "it did not load"
    assert int(found[1]) <= width, "the page scrolls sideways"
    assert int(found[2]) > 10
