"""Memory of the losses on attention maps, forward and backward: maps formed on the fly against maps that are stored.

Peak resident memory of a call above what the process had before it, gradients of the student's queries and keys
included; one process a candidate, the kernel's own peak begun anew after a small call of the same candidate. "eager" is
what the methods' codes do (`benchmarks/test_distillation.py`). BERT-base's heads (12 of 64), a batch of 8.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

KINDS = ("attention_kl", "attention_mse", "relation_kl")

CHILD = """
import sys
import torch
from benchmarks.test_distillation import HEADS, eager_maps
from sparsebert import ops

kind, candidate, seq, dtype = sys.argv[1:]
one = kind == "relation_kl"

def memory(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024

def tensors(batch, seq):
    shape, count = (batch, seq, HEADS, 64), 2 if one else 4
    made = [torch.randn(shape).to(getattr(torch, dtype)).transpose(1, 2) for _ in range(count)]
    half = len(made) // 2
    return [x.requires_grad_() for x in made[:half]], made[half:]

def call(student, teacher):
    if candidate == "fused":
        loss = getattr(ops, kind)(*student, *teacher)
    else:
        loss = eager_maps(kind, [student * 2, teacher * 2] if one else [student, teacher], None)
    return loss, torch.autograd.grad(loss, student)

call(*tensors(1, 16))
student, teacher = tensors(8, int(seq))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = memory("VmRSS")
kept = call(student, teacher)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seq", [128, 384])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_maps(bench: Any, kind: str, seq: int, dtype: str) -> None:
    root = Path(__file__).resolve().parents[1]

    def extra(candidate: str) -> float:
        words = [sys.executable, "-c", CHILD, kind, candidate, str(seq), dtype]
        done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True)
        return float(json.loads(done.stdout))

    found = {candidate: extra(candidate) for candidate in ("fused", "eager")}
    row = {"loss": kind, "seq": seq, "dtype": dtype}
    row |= {f"{candidate} MB": round(memory, 1) for candidate, memory in found.items()}
    maps = 2 * 8 * 12 * seq * seq * torch.empty(0, dtype=getattr(torch, dtype)).element_size() / 2**20
    row |= {"two maps MB": round(maps, 1), "fused / eager": round(found["fused"] / found["eager"], 3)}
    bench.tables.setdefault("attention_losses_memory", []).append(row)
