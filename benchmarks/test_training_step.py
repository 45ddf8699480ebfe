"""A step of Adapting by Pruning against a dense fine-tuning step and the eager way of masking: time and memory.

`dense` trains every weight, embeddings included, with the dropout that BERT's configuration has; `dense, no dropout` is
the same without. `eager` is what the research code does: per matrix a sort of all scores in every forward, W * mask as
a tensor of its own in autograd's graph, the same optimiser. All run under the same autocast, with written-out
attention, which is the fastest on this CPU in bf16 (`sparsebert.training.hardware.choose_attention`).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsebert.training.hardware import has_native_bf16

CASES = [("minilm", 32, 32), ("minilm", 32, 64), ("minilm", 8, 128), ("bert-base", 8, 64)]
DTYPES = [torch.float32, *([torch.bfloat16] if has_native_bf16() else [])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "batch", "seq"), CASES)
def test_step_time(bench, full: bool, shape: str, batch: int, seq: int, dtype: torch.dtype) -> None:
    if not full and (shape, batch) != ("minilm", 8):
        pytest.skip("one of the cells of --full")
    from benchmarks.steps import KINDS, make_step

    steps = {kind: make_step(kind, shape, batch, seq, dtype) for kind in KINDS}
    timings = bench.interleave(steps)
    case = {"model": shape, "batch": batch, "length": seq, "dtype": str(dtype).removeprefix("torch.")}
    bench.row("training_step", case, timings, subject="adapt_prune")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "batch", "seq"), [("minilm", 32, 64), ("bert-base", 8, 64)])
def test_step_memory(bench, full: bool, shape: str, batch: int, seq: int, dtype: torch.dtype) -> None:
    if not full:
        pytest.skip("one of the cells of --full")
    from benchmarks.steps import KINDS

    name = str(dtype).removeprefix("torch.")
    root = Path(__file__).resolve().parent.parent
    peaks = {}
    for kind in KINDS:
        words = [sys.executable, "-m", "benchmarks.steps", kind, shape, str(batch), str(seq), name]
        peaks[kind] = int(subprocess.run(words, cwd=root, capture_output=True, text=True, check=True).stdout)
    row = {"model": shape, "batch": batch, "length": seq, "dtype": name}
    row |= {f"{kind} MiB": round(peak / 2**20) for kind, peak in peaks.items()}
    row |= {f"adapt_prune / {kind}": round(peaks["adapt_prune"] / peaks[kind], 2) for kind in KINDS[1:]}
    bench.tables.setdefault("training_step_memory", []).append(row)
