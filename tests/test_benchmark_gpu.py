"""`python -m benchmarks.gpu`: every part is rehearsed without a GPU; what is red, skipped or left out is named."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # benchmarks/ is part of the repository, not of the package

from benchmarks.gpu import rows  # noqa: E402
from benchmarks.gpu.rows import Target  # noqa: E402
from benchmarks.gpu.worker import PARTS  # noqa: E402

# What torch has for GPUs alone.
GPU_ONLY = (
    "flash",
    "cuDNN",
    "efficient",
    "torch 2:4",
    "cuSPARSELt, searched",
    "torch BSR",
    "FlexAttention",
    "cuBLASLt",
    "torch varlen",
)


def command(*words: str, seconds: float = 1800.0, **environment: str) -> subprocess.CompletedProcess[str]:
    full = [sys.executable, "-m", "benchmarks.gpu", *words]
    there = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(full, cwd=ROOT, env=there, capture_output=True, text=True, timeout=seconds, check=False)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """All parts at once: most of a part's rehearsal is imports."""
    out = tmp_path_factory.mktemp("results")
    done = command("--part", "all", "--rehearse", "--out", str(out))
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    yield out


@pytest.mark.parametrize("part", PARTS)
def test_every_cell_of_a_part_runs(rehearsal: Path, part: str) -> None:
    record: dict[str, Any] = json.loads((rehearsal / f"{part}.json").read_text(encoding="utf-8"))
    assert record["rows"], "no cell"
    for row in record["rows"]:
        assert row["kind"] != "red", row
        if row["kind"] == "skipped":
            assert any(word in row["why"] for word in ("no such op", "sanitizer", "no such format", "datasets")), row
        for name, why in row.get("left out", {}).items():
            assert name in GPU_ONLY, f"{row['cell']}: {name} did not run: {why}"
    text = (rehearsal / f"{part}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {part}\n")
    assert "rehearsal" in text
    # A table's lines have as many cells as its head.
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("| ")}
    assert widths <= {4, 5, 11}, widths


def test_every_goal_has_a_cell(rehearsal: Path) -> None:
    goals = {
        target["goal"]
        for part in PARTS
        for row in json.loads((rehearsal / f"{part}.json").read_text(encoding="utf-8"))["rows"]
        for target in row.get("targets", ())
    }
    from benchmarks.gpu.bench import Bench

    bench = Bench(torch.device("cpu"), lambda row: None)
    for part in PARTS:
        cells = importlib.import_module(f"benchmarks.gpu.{part}").cells(bench)
        goals |= {target.goal for cell in cells for target in cell.settings.get("targets", ())}
    # Their cells make the targets as they go, by what they have measured or for the shape that they are at.
    made = {"G1", "G2", "G3", "G10", "G20", "G21", "G24"}
    assert goals | made >= {f"G{number}" for number in range(1, 31)}, sorted(goals)


def test_a_rehearsal_leaves_nothing_among_the_results(rehearsal: Path) -> None:
    assert not (ROOT / "benchmarks" / "results" / "rehearsal").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = command("--part", "measure")
    assert done.returncode == 2
    assert "sees no CUDA device; --rehearse" in done.stderr


@pytest.mark.parametrize("words", [("--part", "nothing"), ("--part", "model", "--runs", "/no/such"), ()])
def test_what_is_asked_wrongly_is_named(words: tuple[str, ...]) -> None:
    done = command(*words)
    assert done.returncode == 2
    assert "error" in done.stderr


def row(**found: Any) -> rows.Row:
    times = {
        "sparsebert": {"median": 2.0, "low": 1.5, "high": 3.0, "rounds": 31},
        "a": {"median": 3.0, "low": 3.0, "high": 3.0, "rounds": 31},
        "b": {"median": 5.0, "low": 5.0, "high": 5.0, "rounds": 31},
    }
    base = {"kind": "speed", "cell": "c", "case": {"M": 4}, "timed": "cold, gpu", "times": times, "limit ms": 1.0}
    return {**base, "subject": "sparsebert", "facts": {"memory": 0.4}, "targets": [], **found}


@pytest.mark.parametrize(
    ("target", "got", "met"),
    [
        (Target("G5", "faster", 1.5), 1.5, True),
        (Target("G5", "faster", 2.0, ("b",)), 2.5, True),
        (Target("G5", "faster", {"H100": 1.0, "H200": 1.6}), 1.5, False),
        (Target("G1", "slower", 0.7), 0.6667, True),
        (Target("G1", "slower", 0.3, ("b",)), 0.4, False),
        (Target("G20", "limit", 0.8), 0.5, False),
        (Target("G24", "value", 0.5, key="memory"), 0.4, True),
        (Target("G22", "rate", 0.5, key="memory"), 0.4, False),
        (Target("G22", "rate", 0.5, key="absent"), None, None),
        (Target("G9", "faster", 1.0, ("absent",)), None, None),
        (Target("G26", "faster", 1.2, ("b",), ours="a"), 1.6667, True),
    ],
)
def test_a_target_is_held_against_a_row(target: Target, got: float | None, met: bool | None) -> None:
    found = rows.judged(target, row(), "NVIDIA H200")
    assert (found["got"], found["met"]) == (got, met)
    assert found["goal"] == target.goal


def test_results_are_written_whole_and_read_back(tmp_path: Path) -> None:
    red = {"kind": "red", "cell": "d", "case": {}, "why": "a | b\nsecond"}
    rows.write(tmp_path, "kernels", {"device": "x"}, [row(error=float("nan")), red], "note")
    record = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))
    assert record["rows"][0]["error"] == "nan"
    text = (tmp_path / "kernels.md").read_text(encoding="utf-8")
    assert "Failed: no speed is reported" in text
    assert "a \\| b second" in text
    assert not list(tmp_path.glob(".*"))


def test_a_device_names_its_folder() -> None:
    assert rows.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def session(tmp_path: Path) -> Any:
    from benchmarks.gpu.__main__ import _parse, _Session

    found = _Session(_parse(["--part", "kernels", "--out", str(tmp_path)]), ["kernels"])
    found._take({"event": "head", "head": {"device": "NVIDIA H100"}})
    found._take({"event": "cells", "part": "kernels", "names": ["a", "b", "c"]})
    return found


def test_a_cell_that_ends_its_process_is_red_and_the_next_goes_on(tmp_path: Path) -> None:
    found = session(tmp_path)
    found._take({"event": "begin", "part": "kernels", "index": 1, "cell": "b", "case": {"M": 4}, "seconds": 60.0})
    assert not found._fell(-11)
    assert [(row["kind"], row["cell"]) for row in found.rows["kernels"]] == [("red", "b")]
    assert "status -11" in found.rows["kernels"][0]["why"]
    assert found.next == 2


def test_what_was_not_come_to_is_said(tmp_path: Path) -> None:
    found = session(tmp_path)
    found._take({"event": "begin", "part": "kernels", "index": 0, "cell": "a", "case": {}, "seconds": 60.0})
    found.late = True
    assert found._fell(-9), "no other worker begins when the time is spent"
    found._rest()
    assert [(row["kind"], row["cell"]) for row in found.rows["kernels"]] == [
        ("skipped", "a"),
        ("skipped", "b"),
        ("skipped", "c"),
    ]


def test_a_cell_that_hangs_is_ended(tmp_path: Path) -> None:
    found = session(tmp_path)
    assert not found._hangs()
    found._take({"event": "begin", "part": "kernels", "index": 0, "cell": "a", "case": {}, "seconds": -1.0})
    assert found._hangs()
    assert not found._fell(-9)
    assert "it hangs" in found.rows["kernels"][0]["why"]


def test_parts_run_in_the_order_asked_for() -> None:
    from benchmarks.gpu.__main__ import _parse

    assert _parse(["--part", "kernels", "--part", "measure", "--part", "kernels"]).part == ["kernels", "measure"]
    assert _parse(["--part", "all"]).part == list(PARTS)


def test_tests_that_failed_are_told_from_what_they_printed() -> None:
    from benchmarks.gpu.test import _failed

    lines = [
        "[gw3] [  4%] PASSED tests/a.py::b ",
        "[gw3] [ 40%] FAILED tests/a.py::c[x y] ",
        "tests/a.py::d[x y] FAILED                 [ 41%]",
        "FAILED tests/a.py::c[x y] - AssertionError: 3 - 4",
        "FAILED tests/a.py::c[x y] - worker 'gw3' crashed while running 'tests/a.py...",
        "=== 2 failed, 1 passed in 5.00s ===",
    ]
    assert _failed(lines) == ["tests/a.py::c[x y] - AssertionError: 3 - 4", "tests/a.py::d[x y]"]


def test_every_op_is_called_though_one_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import test as part
    from benchmarks.gpu.worker import BROKEN

    told = iter([(BROKEN, "a: called\nb: failed in bfloat16: illegal\n"), (-11, "c: called\n"), (0, "e: called\n")])
    monkeypatch.setattr(part, "_ended", lambda command, seconds: next(told))
    found = part._apart("abcde", time.monotonic() + 60)
    assert {name: became.split(":")[0] for name, became in found.items()} == {
        "a": "called", "b": "failed in bfloat16", "c": "called", "d": "failed", "e": "called",
    }  # fmt: skip


def test_the_device_that_no_longer_answers_gets_another_worker(tmp_path: Path) -> None:
    from benchmarks.gpu.worker import BROKEN

    found = session(tmp_path)
    found._take({"event": "begin", "part": "kernels", "index": 0, "cell": "a", "case": {}, "seconds": 60.0})
    found._take({"event": "end", "part": "kernels", "index": 0})
    assert not found._fell(BROKEN)
    assert found.next == 1
    assert found._fell(1), "without a cell at work there is nothing to go on behind"
