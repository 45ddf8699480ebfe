"""Fine-tuning of all weights: the dense score that a subnetwork is held against."""

from __future__ import annotations

from dataclasses import dataclass

from sparsebert.methods.base import Method, Phase
from sparsebert.methods.phases import WEIGHTS_DEFAULTS, WeightsPhase, check_head_rate

__all__ = ["FineTune"]


@dataclass(frozen=True)
class Settings:
    """Settings of fine-tuning beside Trainer's own."""

    head_learning_rate: float = 1e-3
    """Learning rate of the new head; 0 takes --learning-rate for it too."""


class FineTune(Method):
    """Trains base and head together, dense."""

    name = "finetune"
    summary = "dense fine-tuning of all weights"
    Settings = Settings
    defaults = WEIGHTS_DEFAULTS
    sparsifies = False

    def check(self) -> None:
        super().check()
        check_head_rate(self.settings.head_learning_rate)

    def phases(self) -> list[Phase]:
        return [WeightsPhase(self)]
