"""The little that runs over several ranks need beside Trainer: who writes, and waiting for each other."""

from __future__ import annotations

import os
from typing import Any

import torch

__all__ = ["barrier", "is_main", "share", "start", "world_size"]


def start() -> None:
    """Joins the process group that torchrun announces in the environment; nothing without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        if torch.cuda.is_available():
            PartialState()
        else:
            PartialState(cpu=True, backend="gloo")


def world_size() -> int:
    """Ranks of the run."""
    return torch.distributed.get_world_size() if _ready() else 1


def is_main() -> bool:
    """Whether this rank writes files and scores."""
    return torch.distributed.get_rank() == 0 if _ready() else True


def barrier() -> None:
    """Waits for all ranks."""
    if _ready():
        torch.distributed.barrier()


def share(value: Any) -> Any:
    """The main rank's value, on every rank."""
    if not _ready():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _ready() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
