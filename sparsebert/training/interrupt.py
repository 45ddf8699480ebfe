"""Ctrl-C and SIGTERM: finish the step, save, stop, and say how to go on."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsebert.training import distributed

__all__ = ["InterruptCallback", "Interrupted"]

_NOTICE = "\nstopping: saving at the next step"


class Interrupted(Exception):
    """The run was asked to stop and has saved where it is."""

    def __init__(self, signal_number: int, where: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} {where}")
        self.signal_number = signal_number


class InterruptCallback(TrainerCallback):
    """The first signal lets the step at hand finish and saves; a second one stops at once."""

    def __init__(self) -> None:
        self.received = 0
        self.stopped_at: int | None = None
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Takes over SIGINT and SIGTERM until `remove`; a run in another than the main thread cannot."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)

    def remove(self) -> None:
        """Gives the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def check(self, where: str) -> None:
        """Stops between two steps of work whose results are saved.

        Raises:
            Interrupted: a signal came, to any rank.
        """
        if self._shared():
            raise Interrupted(self.received, where)

    def check_alone(self, where: str) -> None:
        """`check` where only the main rank works: with others waiting, it goes on to the next `check`."""
        if self.received and distributed.world_size() == 1:
            raise Interrupted(self.received, where)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if distributed.world_size() > 1:
                return  # a terminal and torchrun both pass on one Ctrl-C; what hangs, torchrun kills
            raise KeyboardInterrupt
        self.received = number
        if distributed.speaks():
            # Not print: the signal may have come while something else was being printed.
            once_more = " (again to stop at once)" if distributed.world_size() == 1 else ""
            os.write(2, f"{_NOTICE}{once_more}\n".encode())

    def _shared(self) -> int:
        # Ranks hear of a signal at different moments; all must save at the same step.
        if distributed.world_size() > 1:
            device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            shared = torch.tensor(self.received, device=device)
            torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
            self.received = int(shared.item())
        return self.received

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._shared():
            control.should_save = True
            control.should_training_stop = True
            self.stopped_at = state.global_step
