"""A teacher's soft labels beside the hard ones, for every method that takes `--kd`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsebert.methods.base import Method, Phase
from sparsebert.methods.distilling import Distillation
from sparsebert.methods.kd import LogitSettings, check_logits, logit_terms

__all__ = ["TaughtPhase", "Teachable", "TeachableSettings"]


@dataclass(frozen=True)
class TeachableSettings(LogitSettings):
    """Settings of a method that may have a teacher."""

    kd: bool = False
    """Whether to train on a teacher's soft labels too, by the weights of `temperature` and `hard_labels`. The teacher
    is dense: the one of --teacher, or one that is fine-tuned first."""


class Teachable(Method):
    """A method whose phases learn from a teacher if so asked."""

    @classmethod
    def wants_teacher(cls, settings: Any) -> bool:
        return bool(settings.kd)

    def check(self) -> None:
        super().check()
        check_logits(self.settings.temperature, self.settings.hard_labels)


class TaughtPhase(Phase):
    """Mixed in before the class of a `Teachable`'s phase: with `kd` the phase trains on soft labels too.

    The comparison with the untouched model has none, for all methods must share it.
    """

    def start(self) -> None:
        super().start()
        self.objective: Distillation | None = None
        settings, teacher = self.method.settings, self.method.context.teacher
        if settings.kd and teacher is not None:
            self.objective = Distillation(self.module.model, teacher, logit_terms(settings))
        self.module.objective = self.objective

    def logs(self) -> dict[str, float]:
        return {**super().logs(), **(self.objective.logs() if self.objective else {})}

    def finish(self) -> None:
        super().finish()
        self.module.objective = None
