"""Two processes under torchrun: the same masks on both, interruptions of either, one result. Slow: starts processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import Workshop
from training.breaks import assert_same, left_by


def torchrun(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def ranks(workshop: Workshop) -> dict[str, Any]:
    """What both ranks noted of a straight run, one that a signal to the last rank stops, its end, and two others."""
    words = ["--save-strategy", "steps", "--save-steps", "2", "--untouched", "true"]
    straight = workshop.command("adapt_prune", *words, steps=5)
    broken = workshop.command("adapt_prune", *words, steps=5)
    steps = [
        {"words": straight, "signal_at": 0},
        {"words": broken, "signal_at": 3},
        {"words": ["--resume", folder_of(broken)], "signal_at": 0},
        {"words": workshop.command("gmp", "--gradient-accumulation-steps", "2", steps=3), "signal_at": 0},
        {"words": workshop.command("finetune", "--output", folder_of(straight)), "signal_at": 0},
    ]
    plan = workshop.folder / "plan.json"
    plan.write_text(json.dumps(steps), encoding="utf-8")
    script = Path(__file__).with_name("ranks.py")
    done = torchrun(str(script), str(workshop.folder), str(plan), cwd=workshop.folder)
    assert done.returncode == 0, done.stdout + done.stderr
    notes = [
        [json.loads(line) for line in (workshop.folder / f"rank{rank}.jsonl").read_text(encoding="utf-8").splitlines()]
        for rank in range(2)
    ]
    return {"notes": notes, "straight": Path(folder_of(straight)), "broken": Path(folder_of(broken)), "said": done}


def folder_of(words: list[str]) -> str:
    return words[words.index("--output") + 1]


def test_every_rank_has_the_same_tensors_after_every_phase(ranks: dict[str, Any]) -> None:
    first, second = ranks["notes"]
    phases = [name for name, _ in first if name != "status"]
    assert phases == ["untouched", "prune", "untouched", "untouched", "prune", "untouched", "prune"]
    assert first == second
    masks = [name for name, state in first if name == "prune" and any("bits" in key for key in state)]
    assert masks == ["prune"] * 3


def test_a_signal_to_one_rank_stops_both_at_one_step_and_the_resumed_run_is_the_same(ranks: dict[str, Any]) -> None:
    statuses = [value for name, value in ranks["notes"][0] if name == "status"]
    assert statuses == [0, 143, 0, 0, 2]
    assert_same(ranks["straight"], ranks["broken"])
    said = ranks["said"].stderr
    assert f"go on with:  torchrun --nproc-per-node 2 -m sparsebert.train --resume {ranks['broken']}" in said
    assert said.count("error:") == 1, said  # the folder that was taken: said by one rank, raised by both
    assert "already holds a run" in said


def test_the_result_has_the_form_of_one_process(workshop: Workshop, ranks: dict[str, Any]) -> None:
    alone = left_by(workshop.run("adapt_prune", "--untouched", "true", "--logging-steps", "5", steps=5).folder)
    both = left_by(ranks["straight"])
    assert both["result"].keys() == alone["result"].keys()
    assert both["files"].keys() == alone["files"].keys()
    assert both["result"]["ranks"] == 2
    assert both["result"]["sparsity"]["pruned"] == alone["result"]["sparsity"]["pruned"]
    assert [line["step"] for line in both["log"] if line["phase"] == "prune"] == [1, 2, 3, 4, 5, 5]
