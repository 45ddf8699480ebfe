"""Knowledge distillation (Hinton et al., 2015): a student of fewer layers learns the teacher's soft outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparsebert.methods.base import Phase, check_setting
from sparsebert.methods.distilling import Labels, Logits, Term
from sparsebert.methods.student import DistillPhase, StudentMethod, StudentSettings

__all__ = ["Distil", "LogitSettings", "check_logits", "logit_terms"]


@dataclass(frozen=True)
class LogitSettings:
    """Settings of a loss on soft and hard labels."""

    temperature: float = 2.0
    """T of the soft labels."""
    hard_labels: float = 0.5
    """Weight of the task's own loss; the soft one has the rest of 1."""


@dataclass(frozen=True)
class Settings(LogitSettings, StudentSettings):
    """Settings of knowledge distillation."""


def check_logits(temperature: float, hard_labels: float) -> None:
    """Raises a UserError for numbers that cannot be the settings of the same names."""
    check_setting("temperature", temperature, 0.0 < temperature < math.inf, "a positive number")
    check_setting("hard_labels", hard_labels, 0.0 <= hard_labels <= 1.0, "a weight from 0 to 1")


def logit_terms(settings: LogitSettings) -> list[Term]:
    """Soft and hard labels by their weights; a term of weight 0 is left out."""
    hard = settings.hard_labels
    terms: list[Term] = [Logits(settings.temperature, 1.0 - hard)] if hard < 1.0 else []
    return [*terms, Labels(hard)] if hard > 0.0 else terms


class _Distill(DistillPhase):
    def terms(self) -> Sequence[Term]:
        return logit_terms(self.method.settings)


class Distil(StudentMethod):
    """Trains a student on soft and hard labels."""

    name = "kd"
    summary = "knowledge distillation: a student of fewer layers, on the teacher's soft labels"
    Settings = Settings

    def check(self) -> None:
        super().check()
        check_logits(self.settings.temperature, self.settings.hard_labels)

    def phases(self) -> list[Phase]:
        return [_Distill(self)]
