"""The little that several ranks need beside Trainer: who writes, waiting for each other, one answer for all."""

from __future__ import annotations

import atexit
import functools
import os
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

from sparsebert.errors import UserError

__all__ = ["barrier", "gather", "is_main", "once", "rank", "share", "speaks", "start", "world_size"]

# The other ranks wait while the main one scores, which on a large validation set takes more than torch's 10 minutes.
_PATIENCE = timedelta(days=1)


def start() -> None:
    """Joins the process group that torchrun announces in the environment; nothing without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        if torch.cuda.is_available():
            PartialState(timeout=_PATIENCE)
        else:
            PartialState(cpu=True, backend="gloo", timeout=_PATIENCE)
            _name_cpus()
        atexit.unregister(_leave)
        atexit.register(_leave)


def _leave() -> None:
    # Left to the interpreter's end, a thread of the process group may abort a rank whose work is done.
    if _ready():
        torch.distributed.destroy_process_group()


@functools.cache
def _name_cpus() -> None:
    """Lets torch.load take "cpu:0" for a place, where transformers 5.17 puts a checkpoint's optimiser on CPU ranks."""
    torch.serialization.register_package(
        0, lambda storage: None, lambda storage, place: storage if re.fullmatch(r"cpu:\d+", place) else None
    )


def speaks() -> bool:
    """Whether this process prints what every rank finds out; the first of each machine, also before `start`."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def world_size() -> int:
    """Ranks of the run."""
    return torch.distributed.get_world_size() if _ready() else 1


def rank() -> int:
    """This process's number, from 0."""
    return torch.distributed.get_rank() if _ready() else 0


def is_main() -> bool:
    """Whether this rank writes files and scores."""
    return rank() == 0


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


def gather(value: Any) -> list[Any]:
    """Every rank's value, in order, on every rank."""
    if not _ready():
        return [value]
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def once(action: Callable[[], Any]) -> Any:
    """Does something on the main rank alone; its answer, or its `UserError`, reaches every rank."""
    answer: Any = None
    problem: UserError | None = None
    if is_main():
        try:
            answer = action()
        except UserError as error:
            problem = error
    answer, message = share((answer, None if problem is None else str(problem)))
    if message is not None:
        raise problem or UserError(message)
    return answer


def _ready() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
