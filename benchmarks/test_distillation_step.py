"""A distillation step (teacher forward, student forward and backward; logits, hidden states and attention maps of all
layers) against the same losses written out on what the models return: time and memory. `finetune` is the student alone.

Both kinds have the same models, autocast, attention (written out) and optimiser. The losses of both are compared before
anything is timed: the soft one up to the teacher's entropy, which is a constant.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsebert.training.hardware import has_native_bf16

CASES = [("minilm", 32, 64), ("minilm", 16, 128), ("bert-base", 8, 128), ("minilm", 8, 384)]
DTYPES = [torch.float32, *([torch.bfloat16] if has_native_bf16() else [])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "batch", "seq"), CASES)
def test_step_time(bench: Any, full: bool, shape: str, batch: int, seq: int, dtype: torch.dtype) -> None:
    if not full and (shape, seq) != ("minilm", 64):
        pytest.skip("one of the cells of --full")
    from benchmarks.distill_steps import KINDS, make_step

    steps = {kind: make_step(kind, shape, batch, seq, dtype) for kind in KINDS}
    # Same seed, same models: what the losses fall by in a step must agree, the constant apart.
    losses = {kind: [float(steps[kind]()), float(steps[kind]())] for kind in ("distill", "eager")}
    falls = {kind: first - second for kind, (first, second) in losses.items()}
    # Maps and logits in bf16 leave the loss known to some 2^-9 of it.
    known = 1e-3 if dtype == torch.float32 else 2**-9 * losses["eager"][0]
    assert abs(falls["distill"] - falls["eager"]) <= 0.05 * abs(falls["eager"]) + known, losses
    if dtype != torch.float32:
        # What the released codes do, whatever the hardware offers.
        steps["eager fp32"] = make_step("eager", shape, batch, seq, torch.float32)
    timings = bench.interleave(steps)
    case = {"model": shape, "batch": batch, "length": seq, "dtype": str(dtype).removeprefix("torch.")}
    bench.row("distillation_step", case, timings, subject="distill")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "batch", "seq"), CASES[2:])
def test_step_memory(bench: Any, full: bool, shape: str, batch: int, seq: int, dtype: torch.dtype) -> None:
    if not full:
        pytest.skip("one of the cells of --full")
    from benchmarks.distill_steps import KINDS

    name = str(dtype).removeprefix("torch.")
    root = Path(__file__).resolve().parent.parent
    peaks = {}
    for kind in KINDS:
        words = [sys.executable, "-m", "benchmarks.distill_steps", kind, shape, str(batch), str(seq), name]
        peaks[kind] = int(subprocess.run(words, cwd=root, capture_output=True, text=True, check=True).stdout)
    row: dict[str, Any] = {"model": shape, "batch": batch, "length": seq, "dtype": name}
    row |= {f"{kind} MiB": round(peak / 2**20) for kind, peak in peaks.items()}
    extra = {kind: peaks[kind] - peaks["finetune"] for kind in ("distill", "eager")}
    row["extra, distill / eager"] = round(extra["distill"] / extra["eager"], 2)
    bench.tables.setdefault("distillation_step_memory", []).append(row)
