"""Iterative magnitude pruning with rewinding (Frankle and Carbin, 2019; for BERT: Chen et al., 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsebert.methods import one_shot
from sparsebert.methods.base import Phase, check_setting
from sparsebert.methods.one_shot import ResetPhase, Resettable
from sparsebert.methods.phases import WeightsPhase
from sparsebert.methods.teachable import TaughtPhase

__all__ = ["IterativeMagnitude", "rounds_to"]


@dataclass(frozen=True)
class Settings(one_shot.Settings):
    """Settings of iterative pruning."""

    prune_rate: float = 0.2
    """Share of the remaining weights that go in each round."""
    round_steps: int = 0
    """Optimiser steps of a round that prunes; 0 takes Trainer's steps or epochs, as the last phase always does."""


def rounds_to(sparsity: float, rate: float) -> list[float]:
    """The sparsity after each round: `1 - (1 - rate)^r`, the last one exactly the target."""
    levels: list[float] = []
    kept = 1.0 - rate
    # A round that would end a rounding error below the target is the last one.
    while 1.0 - kept < sparsity - 1e-9:
        levels.append(1.0 - kept)
        kept *= 1.0 - rate
    return [*levels, sparsity] if sparsity > 0.0 else []


class _Round(TaughtPhase, WeightsPhase):
    """Trains from the pre-trained weights under the mask at hand, then prunes the smallest of the trained weights."""

    def __init__(self, method: Resettable, name: str, sparsity: float | None) -> None:
        super().__init__(method, name)
        self.sparsity = sparsity

    def start(self) -> None:
        super().start()
        self.method.reset_weights()  # type: ignore[attr-defined]

    def training(self) -> dict[str, Any]:
        steps = self.method.settings.round_steps
        return {"max_steps": steps} if steps and self.sparsity is not None else {}

    def logs(self) -> dict[str, float]:
        return {**super().logs(), "sparsity": self.method.masks.sparsity()}

    def finish(self) -> None:
        super().finish()
        if self.sparsity is not None:
            masks = self.method.masks
            masks.select(masks.magnitude(), self.sparsity, self.method.context.allocation)


class IterativeMagnitude(Resettable):
    """Rounds of training, pruning and rewinding to the pre-trained weights, then training of what is left."""

    name = "imp"
    summary = "iterative magnitude pruning: train, prune 20 % of what is left, rewind; repeated"
    Settings = Settings

    def check(self) -> None:
        super().check()
        rate = self.settings.prune_rate
        check_setting("prune_rate", rate, 0.0 < rate < 1.0, "a share between 0 and 1, e.g. 0.2")
        steps = self.settings.round_steps
        check_setting("round_steps", steps, steps >= 0, "a number of steps, or 0 for Trainer's")

    def phases(self) -> list[Phase]:
        levels = rounds_to(self.context.sparsity, self.settings.prune_rate)
        phases: list[Phase] = list(self.untouched_phases())
        phases += [_Round(self, f"round{number}", level) for number, level in enumerate(levels, 1)]
        pretrained = self.settings.weights == "pretrained"
        phases.append(ResetPhase(self) if pretrained else _Round(self, "finetune", None))
        return phases
