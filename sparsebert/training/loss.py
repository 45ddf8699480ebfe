"""Every training loss is looked at: one that is not finite stops the run, the others make the averages in the log."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsebert.errors import UserError
from sparsebert.training import distributed

__all__ = ["LossCallback", "check_weights"]

_ADVICE = (
    "what was saved before is kept. Start again with another --output and a lower --learning-rate or --precision fp32 "
    "(--config takes this run's config.yaml, flags beside it win), or look for what is odd in the data"
)


class LossCallback(TrainerCallback):
    """Averages losses per optimiser step. Trainer does too, but forgets the sum at hand when a run is resumed.

    Args:
        phase: name of the phase, for messages.
    """

    def __init__(self, phase: str) -> None:
        self.phase = phase
        self._step = 0
        self._micro_batches: list[float] = []
        # Sum and number of steps: since the last log line, and of the whole phase.
        self._recent, self._recent_steps = 0.0, 0
        self._whole, self._whole_steps = 0.0, 0

    def watch(self, module: nn.Module) -> RemovableHandle:
        """Looks at every loss of a training module until the handle is removed."""
        return module.register_forward_hook(self._look)

    @torch.compiler.disable
    def _look(self, module: nn.Module, inputs: Any, output: dict[str, torch.Tensor]) -> None:
        if not module.training or "loss" not in output:
            return
        loss = float(output["loss"].detach())
        if not math.isfinite(loss):
            raise UserError(f"phase {self.phase}: the loss is {loss} at step {self._step}; {_ADVICE}")
        self._micro_batches.append(loss)

    def mean(self) -> float:
        """Mean loss over the steps of the phase so far, on all ranks."""
        return _mean(distributed.gather(self._whole / max(1, self._whole_steps)))

    def saved(self) -> list[float]:
        """This rank's sums, for a checkpoint."""
        return [self._recent, self._recent_steps, self._whole, self._whole_steps]

    def restore(self, saved: list[float]) -> None:
        """Goes on from a checkpoint's sums."""
        self._recent, self._recent_steps = saved[0], int(saved[1])
        self._whole, self._whole_steps = saved[2], int(saved[3])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step = state.global_step + 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = _mean(self._micro_batches)
        self._micro_batches.clear()
        self._recent, self._recent_steps = self._recent + loss, self._recent_steps + 1
        self._whole, self._whole_steps = self._whole + loss, self._whole_steps + 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            logs["loss"] = _mean(distributed.gather(self._recent / max(1, self._recent_steps)))
            self._recent, self._recent_steps = 0.0, 0


def check_weights(phase: str, model: nn.Module, step: int) -> None:
    """A `UserError` if a weight is not finite: a step that breaks the weights shows in no loss before the next one."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(f"phase {phase}: {name} holds NaN or infinite numbers after step {step}; {_ADVICE}")


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))
