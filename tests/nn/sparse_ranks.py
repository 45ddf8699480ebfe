"""Started by torchrun: trains two sparse layers under DistributedDataParallel and notes what each rank has.

Argument: a folder for the notes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsebert.nn import SparseLinear


def build() -> nn.Sequential:
    """The same model on every rank."""
    torch.manual_seed(0)
    first, second = nn.Linear(16, 24), nn.Linear(24, 8)
    some, blocks = torch.rand(24, 16) > 0.7, (torch.rand(2, 24) > 0.5).repeat_interleave(4, 0)
    return nn.Sequential(
        SparseLinear.from_linear(first, some, format="unstructured", trainable=True),
        nn.GELU(),
        SparseLinear.from_linear(second, blocks, format="blocks:4x1", trainable=True),
    )


def train(model: nn.Module, inner: nn.Module, examples: Tensor) -> None:
    """Three steps on the given examples of eight."""
    data = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    for batch in data:
        optimizer.zero_grad()
        model(batch[examples]).square().mean().backward()
        optimizer.step()


def start(notes: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    inner = build()
    if rank:
        with torch.no_grad():
            for parameter in inner.parameters():
                parameter.add_(1.0)  # DDP hands out the first rank's.
    train(nn.parallel.DistributedDataParallel(inner), inner, torch.arange(8)[rank::2])
    weight = inner[0].weight.tolist()  # type: ignore[operator]
    (notes / f"rank{rank}.json").write_text(json.dumps({"weight": weight}), encoding="utf-8")
    # One of gloo's threads may still be letting go of its last work, for which it wants the interpreter: were that
    # ending by then, the process would abort ("terminate called without an active exception"). DDP's reducer keeps
    # the group, and its threads, beyond destroy_process_group().
    os._exit(0)


if __name__ == "__main__":
    start(Path(sys.argv[1]))
