"""Feature extraction: the pre-trained model untouched, a head trained on its states (Peters et al., 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from sparsebert.methods.base import Method, Phase
from sparsebert.methods.phases import HEAD_DEFAULTS, HeadPhase

__all__ = ["FeatureExtraction"]


@dataclass(frozen=True)
class Settings:
    """Nothing of its own: Trainer's flags say how the head is trained."""


class FeatureExtraction(Method):
    """Trains the head alone; the base stays bit-identical."""

    name = "feature_extraction"
    summary = "frozen model, head only"
    Settings = Settings
    defaults = HEAD_DEFAULTS
    sparsifies = False

    def phases(self) -> list[Phase]:
        return [HeadPhase(self)]
