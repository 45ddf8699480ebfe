"""`python -m sparsebert.reproduce` as a user meets it: runs, skips what is done, goes on, prints the table."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from sparsebert.reproduce import main


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Two methods on the tiny task; `broken` names settings that no run takes."""
    shop = tiny.Workshop(tmp_path)
    run = {
        "model": str(shop.model), "task": "custom", "data_dir": str(shop.task), "text_columns": ["text"],
        "label_column": "label", "precision": "fp32", "untouched": False,
    }  # fmt: skip
    for method in ("magnitude", "finetune", "broken"):
        about: dict[str, Any] = {"run": {**run, "method": method.replace("broken", "gmp")}, "trainer": {"max_steps": 2}}
        if method == "broken":
            about["settings"] = {"prunings": 0}
        (tmp_path / "configs" / method).mkdir(parents=True)
        (tmp_path / "configs" / method / "custom.yaml").write_text(yaml.safe_dump(about), encoding="utf-8")
    entries: dict[str, Any] = {
        "finetune": {"label": "dense", "config": "finetune/{task}", "sparsities": []},
        "magnitude": {"config": "magnitude/{task}"},
        "broken": {"config": "broken/{task}"},
    }
    content = {"title": "Mine", "seeds": [1, 2], "sparsities": [0.5], "tasks": {"custom": {}}, "entries": entries}
    path = tmp_path / "configs" / "tables" / "mine.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def test_a_grid_is_run_once_and_shown(table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = [str(table), "--output", str(out), "--jobs", "2", "--entries", "finetune", "magnitude"]
    assert main([*words, "--seeds", "1"]) == 0
    shown = capfd.readouterr().out
    assert "2 runs, 0 of them done before" in shown
    assert "| dense | dense |" in shown and "| magnitude | 50% |" in shown
    first = (out / "magnitude-custom-0.5-s1" / "result.json").read_bytes()
    assert main([*words, "--record"]) == 0
    assert "4 runs, 2 of them done before" in capfd.readouterr().out
    assert (out / "magnitude-custom-0.5-s1" / "result.json").read_bytes() == first
    recorded = tmp_path / "benchmarks" / "results"
    assert "±" in (recorded / "mine.md").read_text(encoding="utf-8")
    assert {row["seed"] for row in json.loads((recorded / "mine.json").read_text(encoding="utf-8"))} == {1, 2}


def test_a_run_that_fails_is_named_and_the_others_go_on(
    table: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([str(table), "--quick", "--output", str(out), "--jobs", "2"]) == 1
    shown = capfd.readouterr().out
    assert "failed (2): broken-custom-0.5-s1; see" in shown
    assert "prunings" in (out / "broken-custom-0.5-s1.log").read_text(encoding="utf-8")
    assert (out / "finetune-custom-s1" / "result.json").is_file()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["none"], "'none'"),
        (["--seeds", "0"], "seeds"),
        (["--seeds", "3"], "names 2, got 3"),
        (["--jobs", "0"], "jobs"),
        (["--entries", "nothing"], "'nothing'"),
        (["--tasks", "rte"], "'rte'"),
        (["--sparsities", "0.7"], "has no 0.7"),
        (["--variants", "noisy"], "has no 'noisy'"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(
    table: Path, words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words if words == ["none"] else [str(table), *words]) == 2
    assert named in capsys.readouterr().err


def test_two_grids_never_share_a_folder(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main([str(table), "--output", str(out)]) == 2
    assert "a grid is running there" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [".lock"]


def test_the_repositorys_tables_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert "tamt-tiny" in capsys.readouterr().out
