"""Adapting by Pruning (Gao, Colombo and Wang, 2021, arXiv 2105.03343): a task is learned by pruning alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparsebert.errors import UserError, unknown
from sparsebert.methods.base import Context, Method, Phase
from sparsebert.methods.phases import HEAD_DEFAULTS, HeadPhase, freeze

__all__ = ["AdaptPrune"]

# Places in the training module's `memory`.
_PUSHED, _REACHED, _RECOVERED = 0, 1, 2


@dataclass(frozen=True)
class Settings:
    """Settings of Adapting by Pruning; `papers` values in brackets where the default differs."""

    score_learning_rate: float = 2e-5
    """Highest step of a score; the schedule is Trainer's."""
    gamma: float = 0.0
    """Constant push that every score receives at each step, towards pruning [2e-7 for MNLI]. 0 takes the push that
    brings the mean score to zero at `prune_until` of the steps, so that any number of steps reaches the target."""
    prune_until: float = 0.6
    """Share of the steps that the push of `gamma` = 0 is made for."""
    init_mean: float = 0.01
    """Mean of the first scores."""
    init_std: float = 0.001
    """Standard deviation of the first scores. (The paper says "variance 0.001", which would start 38 % pruned.)"""
    backward_slope: float = 1.0
    """t_s: the backward pass uses the slope of sigmoid(t_s * score), the forward pass a hard step."""
    regrowth: bool = True
    """Whether a pruned connection may come back."""
    after_target: Literal["hold", "stop"] = "hold"
    """What follows once the target sparsity is reached: `stop` as published, or `hold`: go on training scores and head
    for the remaining steps, the push being just what keeps the target."""


class _Scores(Phase):
    """Trains scores and head; weights are frozen, the mask follows the scores after every step."""

    name = "prune"

    def start(self) -> None:
        method, module = self.method, self.module
        freeze(module)
        module.model.set_base_dropout(False)
        generator = torch.Generator().manual_seed(method.context.seed)
        settings = method.settings
        masks = method.masks
        masks.learn(
            [
                torch.empty(group.shape).normal_(settings.init_mean, settings.init_std, generator=generator).to(bits.device)
                for group, bits in zip(masks.groups, masks.bits, strict=True)
            ]
        )
        module.model.head.requires_grad_(True)
        self.scores: list[Tensor] = list(masks.scores or [])

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        # Decay would pull scores to zero, which is neither in the paper nor neutral: zero is the threshold.
        rate = self.method.settings.score_learning_rate
        return [
            {"params": self.scores, "lr": rate, "weight_decay": 0.0},
            {"params": list(self.module.model.head.parameters()), "lr": learning_rate},
        ]

    @torch.no_grad()
    def before_step(self, step: int, total: int) -> None:
        """Turns the gradient with respect to the mask into that of the scores: times t_s * sigmoid'(t_s * score)."""
        slope, pushed = self.method.settings.backward_slope, float(self.module.memory[_PUSHED])
        for score in self.scores:
            if score.grad is not None:
                level = torch.sigmoid((score - pushed) * slope)
                torch.ops.aten.sigmoid_backward.grad_input(score.grad, level, grad_input=score.grad)
                if slope != 1.0:
                    score.grad.mul_(slope)

    def after_step(self, step: int, total: int) -> bool:
        # The push lowers all scores alike, so it is kept as one number that the threshold rises by.
        memory, masks, context = self.module.memory, self.method.masks, self.method.context
        settings = self.method.settings
        before = masks.units() if not settings.regrowth else []
        if memory[_REACHED] == 0:
            memory[_PUSHED] += settings.gamma or settings.init_mean / max(1.0, settings.prune_until * total)
            masks.above(self.scores, float(memory[_PUSHED]))
            if masks.sparsity() < self._target:
                self._forbid(before)
                return False
            memory[_REACHED] = step
        masks.select(self.scores, context.sparsity, context.allocation)
        memory[_PUSHED] = self._threshold()
        self._forbid(before)
        return settings.after_target == "stop"

    def _forbid(self, before: list[Tensor]) -> None:
        """Without regrowth: what was pruned gets the lowest score, which no step changes."""
        for score, kept in zip(self.scores, before, strict=False):
            score.data.masked_fill_(~kept, -math.inf)

    @property
    def _target(self) -> float:
        return self.method.context.sparsity

    def _threshold(self) -> float:
        """The highest score that is pruned: how far the push has gone."""
        highest = -math.inf
        for score, kept in zip(self.scores, self.method.masks.units(), strict=True):
            pruned = score.detach().masked_fill(kept, -math.inf)
            highest = max(highest, float(pruned.max()))
        return highest if math.isfinite(highest) else float(self.module.memory[_PUSHED])

    def logs(self) -> dict[str, float]:
        return {"sparsity": self.method.masks.sparsity(), "pushed": float(self.module.memory[_PUSHED])}

    def finish(self) -> None:
        # The stop rule looks once a step and may overshoot; the result has exactly the target.
        self.method.masks.select(self.scores, self._target, self.method.context.allocation)


class AdaptPrune(Method):
    """Learns a mask over frozen pre-trained weights, and a head, from the task's loss."""

    name = "adapt_prune"
    summary = "learn by pruning alone: weights frozen, a mask trained for the task"
    Settings = Settings
    defaults = {**HEAD_DEFAULTS, "max_grad_norm": 0.0}

    def phases(self) -> list[Phase]:
        return [*self.untouched_phases(), _Scores(self)]
