"""Soft movement pruning (Sanh, Wolf and Rush, 2020, arXiv 2005.07683): scores against a threshold, pushed by a penalty.

As `movement`, but what is kept is every unit with sigmoid(S) > tau, and `penalty` times the mean of sigmoid(S) is added
to the loss. Threshold and penalty rise together along the cubic schedule, from 0. Each matrix finds its own sparsity;
that of the whole follows from the penalty, the task and the number of steps, and the paper tunes the penalty for it.

Where this departs from the paper, beside what `movement` says, and why:

- *Penalty*: with `penalty` 0 it is found on the way. It is set against the scores' mean gradient, and grows a little in
  every step that finds the model less sparse than the cubic schedule says, and shrinks in every other step.
- *Target*: the mask never prunes more than the target, and from `prune_until` on exactly that: the units of the lowest
  scores. So the sparsity is the one asked for, and the cool-down trains what the result will have.

A score must fall from 0 to -2.2 before its unit goes (tau = 0.1): at the default rate some 300 steps of one sign. In a
short run take a higher `score_learning_rate`, or most units go at once at `prune_until`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sparsebert.methods import movement
from sparsebert.methods.base import Phase, check_setting
from sparsebert.methods.gmp import cubic_sparsity
from sparsebert.methods.movement import Movement, TrainedScorePhase

__all__ = ["SoftMovement"]

# Place in the training module's `memory`: the automatic penalty's strength against the mean gradient.
_STRENGTH = 0
_STEP, _WEAKEST, _STRONGEST = 1.1, 1e-3, 1e3


@dataclass(frozen=True)
class Settings(movement.Settings):
    """Settings of soft movement pruning."""

    threshold: float = 0.1
    """tau at the end of the schedule: what sigmoid(score) must exceed."""
    penalty: float = 0.0
    """lambda at the end of the schedule, of the mean over the matrices of the mean sigmoid(score) (for BERT-base 20 to
    several hundred, by the sparsity wanted); 0 finds the one that keeps to the sparsity's cubic schedule."""


class _Soft(TrainedScorePhase):
    """Keeps what is above a threshold, up to the target."""

    def start(self) -> None:
        super().start()
        self.module.memory[_STRENGTH] = 1.0

    @torch.no_grad()
    def before_step(self, step: int, total: int) -> None:
        """Adds the penalty's gradient: factor * sigmoid'(score)."""
        rise = cubic_sparsity(self.progress(step, total), 1.0)
        gradients = [score.grad for score in self.scores if score.grad is not None]
        if rise == 0.0 or len(gradients) < len(self.scores):
            return
        penalty = self.method.settings.penalty
        if penalty == 0.0:
            # 4: so that at strength 1 a score of 0 is pushed by just the mean gradient.
            units = sum(gradient.numel() for gradient in gradients)
            mean = sum(gradient.abs().sum(dtype=torch.float64) for gradient in gradients) / units
            factors = [4.0 * rise * float(self.module.memory[_STRENGTH] * mean)] * len(gradients)
        else:
            factors = [rise * penalty / (gradient.numel() * len(gradients)) for gradient in gradients]
        for score, gradient, factor in zip(self.scores, gradients, factors, strict=True):
            level = score.sigmoid()
            gradient.add_(level.mul_(1.0 - level), alpha=factor)

    def follow(self, progress: float) -> None:
        settings, masks, context = self.method.settings, self.method.masks, self.method.context
        if progress >= 1.0:
            masks.select(self.scores, context.sparsity, context.allocation)
            return
        tau = cubic_sparsity(progress, settings.threshold)
        masks.above(self.scores, math.log(tau / (1.0 - tau)) if tau > 0.0 else -math.inf)
        sparsity = masks.sparsity()
        behind = sparsity < cubic_sparsity(progress, context.sparsity)
        if sparsity > context.sparsity:
            masks.select(self.scores, context.sparsity, context.allocation)
        if progress > 0.0:
            strength = float(self.module.memory[_STRENGTH]) * (_STEP if behind else 1.0 / _STEP)
            self.module.memory[_STRENGTH] = min(max(strength, _WEAKEST), _STRONGEST)

    def logs(self) -> dict[str, float]:
        return {**super().logs(), "strength": float(self.module.memory[_STRENGTH])}


class SoftMovement(Movement):
    """Movement pruning by a global threshold on the scores, with a penalty that lowers them."""

    name = "soft_movement"
    summary = "soft movement pruning: scores above a threshold kept, a penalty pushes them down"
    Settings = Settings

    def check(self) -> None:
        super().check()
        tau, penalty = self.settings.threshold, self.settings.penalty
        check_setting("threshold", tau, 0.0 < tau < 0.5, "a number above 0 and below 0.5, where the scores start")
        check_setting("penalty", penalty, 0.0 <= penalty < math.inf, "0 (found on the way) or a positive number")

    def pruning(self) -> Phase:
        return _Soft(self)
