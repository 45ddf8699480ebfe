"""What happens around Trainer's steps: the method's turn, logs, progress, interruptions, complete checkpoints."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsebert.errors import UserError
from sparsebert.methods.base import Phase
from sparsebert.training.folder import RunFolder, mark_complete

__all__ = ["CheckpointCallback", "InterruptCallback", "Interrupted", "LogCallback", "PhaseCallback", "ProgressCallback"]


class Interrupted(Exception):
    """The run was asked to stop and has saved where it is."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}")
        self.signal_number = signal_number
        self.step = step


class PhaseCallback(TrainerCallback):
    """Gives the method its turn after each optimiser step, and names a loss that is not finite."""

    def __init__(self, phase: Phase) -> None:
        self.phase = phase

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.phase.loaded()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.phase.before_step(state.global_step + 1, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.phase.after_step(state.global_step, state.max_steps):
            control.should_training_stop = True


class FiniteLoss:
    """A forward hook that stops the run at the first loss that is not finite, before it reaches a weight."""

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self.forwards = 0

    def __call__(self, module: torch.nn.Module, inputs: Any, output: dict[str, torch.Tensor]) -> None:
        if not module.training or "loss" not in output:
            return
        self.forwards += 1
        if not torch.isfinite(output["loss"].detach()).item():
            raise UserError(
                f"phase {self.phase}: the loss is {output['loss'].item()} at forward {self.forwards} of this start; "
                "nothing saved was overwritten. Try a lower --learning-rate, --precision fp32, or check the data; "
                "then start again, or go on from the last checkpoint with --resume"
            )


class LogCallback(TrainerCallback):
    """Writes Trainer's logs, with the method's own numbers, to the run's metrics.jsonl."""

    def __init__(self, folder: RunFolder, phase: Phase) -> None:
        self.folder = folder
        self.phase = phase

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or not state.is_world_process_zero:
            return
        # Trainer hands the same dict to every reporter: what is added here reaches TensorBoard and W&B too.
        logs.update(self.phase.logs())
        entry: dict[str, Any] = {"phase": self.phase.name, "step": state.global_step, **logs}
        entry = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in entry.items()}
        with open(self.folder.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class CheckpointCallback(TrainerCallback):
    """Marks a checkpoint as complete once all of its files are on disk."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # every rank writes its own random state
        if state.is_world_process_zero:
            mark_complete(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")


class InterruptCallback(TrainerCallback):
    """Ctrl-C and SIGTERM: finish the step, save, stop. A second one stops at once."""

    def __init__(self) -> None:
        self.received = 0
        self.stopped_at: int | None = None
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Takes over SIGINT and SIGTERM until `remove`."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)

    def remove(self) -> None:
        """Gives the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number
        print("\nstopping: saving at the next step (again to stop at once)", file=sys.stderr, flush=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        received = self.received
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Ranks hear of a signal at different moments; all must save at the same step.
            shared = torch.tensor(received, device=args.device)
            torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
            self.received = received = int(shared.item())
        if received:
            control.should_save = True
            control.should_training_stop = True
            self.stopped_at = state.global_step


class ProgressCallback(TrainerCallback):
    """A progress bar on a terminal; a line for every logging step in a pipe."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._bar: Any = None
        self._task: Any = None
        self._note = ""
        self._started = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.monotonic()
        if not state.is_world_process_zero or not sys.stdout.isatty():
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        self._task = self._bar.add_task(self.title, total=state.max_steps, completed=state.global_step, note="")
        self._bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, note=self._note)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        shown = [
            f"{key} {logs[key]:.4f}" for key in ("loss", "eval_loss", "sparsity", "kept_loss") if logs and key in logs
        ]
        if not shown or not state.is_world_process_zero:
            return
        self._note = "  ".join(shown)
        if self._bar is None:
            spent = time.monotonic() - self._started
            print(f"{self.title}  {state.global_step}/{state.max_steps}  {self._note}  {spent:.0f} s", flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Takes the bar down, also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
