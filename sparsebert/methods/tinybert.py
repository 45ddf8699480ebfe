"""TinyBERT's task-specific distillation (Jiao et al., 2020): all layers first, then the logits.

Each student layer learns the attention scores and the hidden states of the teacher's layer at the same share of the
depth, the embedding outputs too, summed over the layers; a narrower student's states go through one learned linear.

Where this departs from the paper, and why:

- The student is a cut of the pre-trained model (or any smaller checkpoint), not one that was distilled on general text,
  and there is no data augmentation: the setting in which CR-ILD compares it.
- Padding does not count, neither in the maps nor in the states: it is nothing to learn.
- Where the widths are equal there is no linear: states are compared as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsebert.methods.distilling import AttentionMSE, Hidden, Term, uniform_map
from sparsebert.methods.layers_first import LAYERS_FIRST_DEFAULTS, LayersFirst, LayersSettings

__all__ = ["TinyBert"]


@dataclass(frozen=True)
class Settings(LayersSettings):
    """Settings of TinyBERT's distillation."""

    temperature: float = 1.0
    ild_learning_rate: float = 5e-5


class TinyBert(LayersFirst):
    """Distils every layer, then the logits."""

    name = "tinybert"
    summary = "TinyBERT: attention scores and hidden states of all layers, then the teacher's logits"
    Settings = Settings
    defaults = {**LAYERS_FIRST_DEFAULTS, "num_train_epochs": 3.0}  # noqa: RUF012 (a Mapping in the base)

    def check(self) -> None:
        super().check()
        self.check_width()
        self.check_heads("use --method minilm, which compares relations")
        uniform_map(*self.layers())

    def layer_terms(self) -> Sequence[Term]:
        maps, states = uniform_map(*self.layers()), uniform_map(*self.layers(), embeddings=True)
        return [
            AttentionMSE(maps, on="scores", weight=len(maps)),
            Hidden(states, project=self.project, weight=len(states)),
        ]
