"""What happens around Trainer's steps: the method's turn, the log, complete checkpoints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsebert.methods.base import Phase
from sparsebert.training import distributed
from sparsebert.training.folder import Checkpoint, RunFolder
from sparsebert.training.loss import LossCallback, check_weights

__all__ = ["CheckpointCallback", "LogCallback", "PhaseCallback", "TrainSliceCallback"]


class PhaseCallback(TrainerCallback):
    """Gives the method its turn around each optimiser step."""

    def __init__(self, phase: Phase) -> None:
        self.phase = phase
        self.ended = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.phase.loaded()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.phase.before_step(state.global_step + 1, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.ended = self.phase.after_step(state.global_step, state.max_steps) or state.global_step >= state.max_steps
        if self.ended:
            control.should_training_stop = True


class LogCallback(TrainerCallback):
    """Adds the method's numbers to Trainer's logs of losses, and writes all logs to the run's metrics.jsonl.

    Trainer's last line, with its times, is left out: it knows nothing of what came before a resume. The run writes
    its own (`phase_summary`).
    """

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
        if "loss" in logs:
            # Trainer hands the same dict to every reporter: what is added here reaches TensorBoard and W&B too.
            logs.update(self.phase.logs())
        if "train_runtime" not in logs:
            self.folder.append_metrics({"phase": self.phase.name, "step": state.global_step, **logs})


class TrainSliceCallback(TrainerCallback):
    """After each evaluation of what is held out, evaluates rows that are trained on too, logged as `eval_train_...`.

    Args:
        trainer: evaluates.
        rows: an encoded slice of train.
    """

    def __init__(self, trainer: Trainer, rows: Any) -> None:
        self.trainer = trainer
        self.rows = rows
        self._inside = False

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._inside:
            return
        self._inside = True
        try:
            self.trainer.evaluate(self.rows, metric_key_prefix="eval_train")
        finally:
            self._inside = False


class CheckpointCallback(TrainerCallback):
    """Adds to Trainer's checkpoint what it does not hold, and marks it as complete once all files are on disk.

    Args:
        phase: knows whether the phase is at its end.
        losses: has the sums for the log.
        seconds: training time of the phase before this start.
    """

    def __init__(self, phase: PhaseCallback, losses: LossCallback, seconds: float = 0.0) -> None:
        self.phase = phase
        self.losses = losses
        self._begun = time.monotonic() - seconds

    @property
    def seconds(self) -> float:
        """Training time of the phase, over all starts."""
        return time.monotonic() - self._begun

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        check_weights(self.phase.phase.name, self.phase.phase.module.model, state.global_step)
        losses = distributed.gather(self.losses.saved())
        distributed.barrier()  # every rank writes its own random state
        if state.is_world_process_zero:
            path = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            Checkpoint(path).complete(ended=self.phase.ended, seconds=self.seconds, losses=losses)
