"""What is seen of a run under way: a bar on a terminal, a line for every logging step in a pipe."""

from __future__ import annotations

import sys
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["Bar", "ProgressCallback"]

_NOT_SHOWN = ("_runtime", "_per_second")


class Bar:
    """A rich progress bar where standard output is a terminal, else nothing.

    Args:
        title: what is under way.
        total: how many steps, or examples, it has.
        done: how many of them were done before.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self._bar: Any = None
        if not sys.stdout.isatty():
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        self._task = self._bar.add_task(title, total=total, completed=done, note="")
        self._bar.start()

    @property
    def shown(self) -> bool:
        """Whether there is a bar to be seen."""
        return self._bar is not None

    def update(self, done: int, note: str = "") -> None:
        """Moves on."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class ProgressCallback(TrainerCallback):
    """Shows the steps of a phase.

    Args:
        title: name of the phase.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._bar: Bar | None = None
        self._note = ""
        self._started = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.monotonic()
        if state.is_world_process_zero:
            self._bar = Bar(self.title, state.max_steps, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step, self._note)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        shown = _shown(logs or {})
        if not shown or self._bar is None:
            return
        self._note = "  ".join(f"{key} {value:.4f}" for key, value in shown.items())
        if self._bar.shown:
            self._bar.update(state.global_step, self._note)
        else:
            spent = time.monotonic() - self._started
            print(f"{self.title}  {state.global_step}/{state.max_steps}  {self._note}  {spent:.0f} s", flush=True)

    def close(self) -> None:
        """Takes the bar down, also after an error."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _shown(logs: dict[str, float]) -> dict[str, float]:
    """What of a log line is worth a place on the screen: the loss and the method's numbers, or an evaluation."""
    if "loss" in logs:
        return {key: logs[key] for key in ("loss", "sparsity", "kept_loss") if key in logs}
    return {key: value for key, value in logs.items() if key.startswith("eval_") and not key.endswith(_NOT_SHOWN)}
