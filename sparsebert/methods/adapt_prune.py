"""Adapting by Pruning (Gao, Colombo and Wang, 2021, arXiv 2105.03343): a task is learned by pruning alone.

Weights stay as they were pre-trained. Every prunable unit has a score; a unit is kept where its score is above the
push so far. The forward pass uses that hard mask, the backward pass the slope of a sigmoid; a push, the same for all
scores, drives them towards pruning until the target sparsity is reached. Beside the mask only the head is trained.

Where this departs from the paper, and why:

- *Step*: Adam's (any `--optim` of Trainer) in place of plain gradient descent. At the published rate of 2e-5 and a
  slope of 0.25 a plain step would hardly move a score that starts at 0.01.
- *First scores*: magnitudes (`init="magnitude"`) in place of one positive value with noise (`init="normal"`). What the
  task does not care about is then pruned where it hurts least, and the task decides only where it does care.
- *Push*: the one that keeps the sparsity on a cubic curve (Zhu and Gupta, 2018: fast first, slow at the end) up to the
  target at `prune_until` of the steps, in place of a constant `gamma`, whose right value depends on the number of
  steps, the sparsity and the data.
- *After the target*: scores and head train on to the last step, at the target sparsity, in place of stopping.
- *What is masked*: the encoder's linears (`--masked`), where the paper masks the embeddings too.

`--init normal --gamma 2e-7 --after-target stop --masked encoder embeddings` is the published method but for the step.
So small a gamma reaches no high sparsity in a few hundred steps: what is missing at the end is then pruned at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sparsebert.errors import unknown
from sparsebert.methods.base import Method, Phase, check_setting
from sparsebert.methods.gmp import cubic_sparsity
from sparsebert.methods.phases import HEAD_DEFAULTS, freeze
from sparsebert.patterns import units_to_prune

__all__ = ["AdaptPrune"]

# Places in the training module's `memory`.
_PUSHED, _REACHED = 0, 1

# The push moves slowly against the width of the sigmoid: with a schedule it is looked up once in so many steps.
_LOOK_UP_EVERY = 10


@dataclass(frozen=True)
class Settings:
    """Settings of Adapting by Pruning."""

    score_learning_rate: float = 2e-4
    """Highest step of a score; the schedule is Trainer's (2e-5 in the paper, without Adam)."""
    init: Literal["magnitude", "normal"] = "magnitude"
    """First scores: `magnitude`, |W| over its mean in the matrix, times `init_mean`; or `normal`, `init_mean` alone
    (the paper's); both with noise of `init_std`."""
    init_mean: float = 0.01
    """Mean of the first scores."""
    init_std: float = 0.001
    """Standard deviation of the noise on the first scores. (The paper says "variance 0.001", which would start 38 %
    pruned.)"""
    gamma: float = 0.0
    """Constant push of every score at each step, up to the target (2e-7 for MNLI in the paper). 0 takes the push that
    lets the sparsity rise along a cubic, to the target at `prune_until`."""
    prune_until: float = 0.6
    """Share of the steps at which the target is reached, with `gamma` 0."""
    after_target: Literal["hold", "stop"] = "hold"
    """What follows once the target sparsity is reached: `stop` as published, or `hold`: train scores and head on for
    the remaining steps, with just the push that keeps the target."""
    regrowth: bool = True
    """Whether a pruned connection may come back."""
    backward_slope: float = 1.0
    """t_s: the backward pass takes the slope of sigmoid(t_s * score), the forward pass a hard step."""


class _Scores(Phase):
    """Trains scores and head; weights are frozen, the mask follows the scores after every step."""

    name = "prune"

    def start(self) -> None:
        module, masks = self.module, self.method.masks
        freeze(module)
        module.model.set_base_dropout(False)
        module.memory.zero_()
        self.method.new_head()
        masks.learn(self._first_scores())
        module.model.head.requires_grad_(True)
        self.scores: list[Tensor] = list(masks.scores or [])

    def _first_scores(self) -> list[Tensor]:
        settings, masks = self.method.settings, self.method.masks
        generator = torch.Generator().manual_seed(self.method.context.seed)
        first = []
        for size in masks.magnitude():
            if settings.init == "magnitude":
                level = size * (settings.init_mean / size.mean().clamp(min=1e-30))
            else:
                level = torch.full_like(size, settings.init_mean)
            noise = torch.empty(size.shape).normal_(0.0, settings.init_std, generator=generator)
            first.append(level + noise.to(size.device))
        return first

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
                level = score - pushed
                if slope != 1.0:
                    level.mul_(slope)
                level.sigmoid_()
                torch.ops.aten.sigmoid_backward.grad_input(score.grad, level, grad_input=score.grad)
                if slope != 1.0:
                    score.grad.mul_(slope)

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> bool:
        settings, memory, masks = self.method.settings, self.module.memory, self.method.masks
        if not settings.regrowth:
            for score, kept in zip(self.scores, masks.units(), strict=True):
                score.masked_fill_(~kept, -math.inf)  # no step changes that
        total_units = sum(score.numel() for score in self.scores)
        goal = units_to_prune(self._target, total_units)
        if settings.gamma > 0.0 and memory[_REACHED] == 0:
            # The push lowers all scores alike, so it is kept as one number that the threshold rises by.
            memory[_PUSHED] += settings.gamma
            masks.above(self.scores, float(memory[_PUSHED]))
            reached = masks.counts()[0] >= goal
            if reached:
                masks.select(self.scores, self._target, self.method.context.allocation)
        else:
            progress = 1.0 if settings.gamma > 0.0 else step / max(1.0, settings.prune_until * total)
            sparsity = cubic_sparsity(progress, self._target)
            reached = units_to_prune(sparsity, total_units) >= goal
            masks.select(self.scores, sparsity, self.method.context.allocation)
            if step % _LOOK_UP_EVERY == 0:
                memory[_PUSHED] = self._push_so_far()
        if reached and memory[_REACHED] == 0:
            memory[_REACHED] = step
        return bool(reached) and settings.after_target == "stop"

    @property
    def _target(self) -> float:
        return self.method.context.sparsity

    def _push_so_far(self) -> float:
        """The highest pruned score that may still come back; where there is none, the push as it was."""
        units = zip(self.scores, self.method.masks.units(), strict=True)
        highest = max(float(score.masked_fill(kept, -math.inf).max()) for score, kept in units)
        return highest if math.isfinite(highest) else float(self.module.memory[_PUSHED])

    def logs(self) -> dict[str, float]:
        return {"sparsity": self.method.masks.sparsity(), "pushed": float(self.module.memory[_PUSHED])}

    @torch.no_grad()
    def finish(self) -> None:
        # The stop rule looks once a step and may overshoot; the result has exactly the target.
        self.method.masks.select(self.scores, self._target, self.method.context.allocation)


class AdaptPrune(Method):
    """Learns a mask over frozen pre-trained weights, and a head, from the task's loss."""

    name = "adapt_prune"
    summary = "learn by pruning alone: weights frozen, a mask trained for the task"
    Settings = Settings
    # Clipping by the norm over all scores would change nothing under Adam, and costs a pass over them.
    defaults: ClassVar[dict[str, Any]] = {**HEAD_DEFAULTS, "max_grad_norm": 0.0}

    def check(self) -> None:
        super().check()
        settings = self.settings
        for name, known in (("init", ("magnitude", "normal")), ("after_target", ("hold", "stop"))):
            if getattr(settings, name) not in known:
                raise unknown(name, str(getattr(settings, name)), known)
        for name in ("score_learning_rate", "init_mean", "backward_slope"):
            value = getattr(settings, name)
            check_setting(name, value, 0.0 < value < math.inf, "a positive number")
        for name in ("gamma", "init_std"):
            value = getattr(settings, name)
            check_setting(name, value, 0.0 <= value < math.inf, "zero or a positive number")
        until = settings.prune_until
        check_setting("prune_until", until, 0.0 < until <= 1.0, "a share of the steps above 0, at most 1")

    def phases(self) -> list[Phase]:
        return [*self.untouched_phases(), _Scores(self)]
