"""Masks that are chosen once, before training: what `magnitude` and `random` share, and the reset to the original."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsebert.errors import unknown
from sparsebert.methods.base import Context, Phase
from sparsebert.methods.phases import WEIGHTS_DEFAULTS, HeadPhase, WeightsPhase, check_head_rate
from sparsebert.methods.teachable import TaughtPhase, Teachable, TeachableSettings

__all__ = ["WEIGHTS", "OneShot", "ResetPhase", "Resettable", "Settings"]

WEIGHTS = ("trained", "pretrained")


@dataclass(frozen=True)
class Settings(TeachableSettings):
    """Settings of pruning by weights."""

    weights: Literal["trained", "pretrained"] = "trained"
    """What the kept weights are in the end: trained under the mask, or the pre-trained values with only the head
    trained (how Adapting by Pruning compares the baselines)."""
    head_learning_rate: float = 1e-3
    """Learning rate of the new head; 0 takes --learning-rate for it too."""


class Resettable(Teachable):
    """A method that can put weights back to their pre-trained values."""

    defaults = WEIGHTS_DEFAULTS

    def __init__(self, context: Context, settings: Settings) -> None:
        super().__init__(context, settings)
        self._first_base = {name: tensor.detach().clone() for name, tensor in context.model.base.named_parameters()}

    def check(self) -> None:
        super().check()
        if self.settings.weights not in WEIGHTS:
            raise unknown("weights", self.settings.weights, WEIGHTS)
        check_head_rate(self.settings.head_learning_rate)

    @torch.no_grad()
    def reset_weights(self) -> None:
        """Base weights back to pre-trained values, pruned ones zero; the head back to its first values."""
        for name, parameter in self.context.model.base.named_parameters():
            parameter.copy_(self._first_base[name])
        self.masks.zero_pruned()
        self.masks.refresh()
        self.new_head()

    def untouched_phases(self) -> list[Phase]:
        phases = super().untouched_phases()
        for phase in phases:
            if isinstance(phase, HeadPhase):
                phase.learning_rate = self.settings.head_learning_rate
        return phases


class ResetPhase(TaughtPhase, HeadPhase):
    """Puts the kept weights back to their pre-trained values and trains a new head on the subnetwork."""

    def __init__(self, method: Resettable) -> None:
        super().__init__(method, "head", learning_rate=method.settings.head_learning_rate)

    def start(self) -> None:
        super().start()
        self.method.reset_weights()  # type: ignore[attr-defined]


class _Prune(TaughtPhase, WeightsPhase):
    """Chooses the mask, then trains what is left."""

    def start(self) -> None:
        super().start()
        self.method.prune()  # type: ignore[attr-defined]


class _PruneHead(TaughtPhase, HeadPhase):
    """Chooses the mask, then trains a head on what is left."""

    def start(self) -> None:
        super().start()
        self.method.prune()  # type: ignore[attr-defined]


class OneShot(Resettable):
    """Prunes at once to the target, then trains."""

    Settings = Settings

    @abstractmethod
    def scores(self) -> list[Tensor]:
        """fp32 scores, one tensor per score group; the smallest are pruned."""

    def prune(self) -> None:
        """Sets the mask at the target sparsity and zeroes what it prunes."""
        context = self.context
        self.masks.select(self.scores(), context.sparsity, context.allocation)
        self.masks.zero_pruned()
        self.masks.refresh()
        self.new_head()

    def phases(self) -> list[Phase]:
        rate = self.settings.head_learning_rate
        last: Phase = (
            _Prune(self) if self.settings.weights == "trained" else _PruneHead(self, "head", learning_rate=rate)
        )
        return [*self.untouched_phases(), last]
