"""Movement pruning (Sanh, Wolf and Rush, 2020, arXiv 2005.07683): what moves away from zero while it is trained stays.

Every prunable unit has a score, which starts at 0 and is trained beside the weights: its gradient is that of the mask,
dL/dS = dL/dW' * W (summed over the unit), straight through the step. The units of the highest scores are kept; a cubic
schedule says how many, after a warm-up in which nothing is pruned and before a cool-down at the target. A pruned weight
keeps its value until the end and comes back where its score rises again.

Where this departs from the paper, and why:

- *Length*: warm-up and cool-down are shares of the steps, in place of numbers of steps that fit one task's size (the
  published run on SQuAD has one epoch of ten before and two after).
- *Allocation*: scores are ranked over all matrices, as for every method here; `--allocation matrix` is the paper's.
- *Distillation*: off unless `--kd` is given; its weights are then the paper's (0.9 soft, 0.1 hard, T = 2).
- *What is masked*: as `--masked` says; the pooler, which the paper masks too, is not part of `encoder`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsebert.methods import one_shot
from sparsebert.methods.base import Method, Phase, check_setting
from sparsebert.methods.gmp import check_span, cubic_sparsity
from sparsebert.methods.one_shot import ResetPhase, Resettable
from sparsebert.methods.phases import WEIGHTS_DEFAULTS, WeightsPhase
from sparsebert.methods.teachable import TaughtPhase

__all__ = ["Movement", "ScorePhase", "ScoreSettings", "check_scores"]


@dataclass(frozen=True)
class ScoreSettings:
    """Settings of masks that follow trained scores."""

    score_learning_rate: float = 1e-2
    """Learning rate of the scores; the schedule is Trainer's."""
    prune_from: float = 0.1
    """Share of the steps before the first unit is pruned."""
    prune_until: float = 0.8
    """Share of the steps at which the target is reached; the rest trains at the target, scores included."""


@dataclass(frozen=True)
class Settings(ScoreSettings, one_shot.Settings):
    """Settings of movement pruning."""

    hard_labels: float = 0.1
    """With `kd`, weight of the task's own loss; the soft one has the rest of 1."""


def check_scores(settings: ScoreSettings) -> None:
    """Raises a UserError for settings that cannot work."""
    rate = settings.score_learning_rate
    check_setting("score_learning_rate", rate, 0.0 < rate < math.inf, "a positive number")
    check_span(settings.prune_from, settings.prune_until)


class ScorePhase(TaughtPhase):
    """Mixed in before a phase's class: scores are trained too, and the mask follows them after every step."""

    name = "prune"

    def start(self) -> None:
        super().start()
        masks = self.method.masks
        self.module.memory.zero_()
        pairs = zip(masks.groups, masks.bits, strict=True)
        masks.learn([torch.zeros(group.shape, device=bits.device) for group, bits in pairs])
        self.scores: list[Tensor] = list(masks.scores or [])

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        # Decay would pull the scores of what is pruned and what is kept towards each other.
        rate = self.method.settings.score_learning_rate
        return [
            {"params": self.scores, "lr": rate, "weight_decay": 0.0},
            *super().parameter_groups(learning_rate),
        ]

    def progress(self, step: int, total: int) -> float:
        """Share of the pruning schedule that is behind; below 0 in the warm-up."""
        settings = self.method.settings
        first = int(settings.prune_from * total)
        last = max(first + 1, int(settings.prune_until * total))
        return (step - first) / (last - first)

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> bool:
        # Also renews W * mask; pruned weights are left as they are.
        self.follow(self.progress(step, total))
        return False

    def follow(self, progress: float) -> None:
        """Sets the mask that the scores and the schedule say."""
        masks, context = self.method.masks, self.method.context
        masks.select(self.scores, cubic_sparsity(progress, context.sparsity), context.allocation)

    def logs(self) -> dict[str, float]:
        return {**super().logs(), "sparsity": self.method.masks.sparsity()}

    @torch.no_grad()
    def finish(self) -> None:
        super().finish()
        masks, context = self.method.masks, self.method.context
        masks.select(self.scores, context.sparsity, context.allocation)


class TrainedScorePhase(ScorePhase, WeightsPhase):
    """Trains weights, head and scores. What is pruned in the end is zero only then."""

    def __init__(self, method: Method) -> None:
        super().__init__(method, "prune")

    def finish(self) -> None:
        super().finish()
        self.method.masks.zero_pruned()


class Movement(Resettable):
    """Weights and a mask trained together; the mask by first-order scores."""

    name = "movement"
    summary = "movement pruning: scores learned beside the weights, the highest kept on a cubic schedule"
    Settings = Settings
    defaults: ClassVar[dict[str, Any]] = {**WEIGHTS_DEFAULTS, "learning_rate": 3e-5}

    def check(self) -> None:
        super().check()
        check_scores(self.settings)

    def phases(self) -> list[Phase]:
        phases = [*self.untouched_phases(), self.pruning()]
        if self.settings.weights == "pretrained":
            phases.append(ResetPhase(self))
        return phases

    def pruning(self) -> Phase:
        """The phase that learns the mask."""
        return TrainedScorePhase(self)
