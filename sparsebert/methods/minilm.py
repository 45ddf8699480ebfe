"""MiniLMv2 (Wang et al., 2021) for a task: the last layer's self-relations first, then the logits.

The student's last layer learns how queries, keys and values of one teacher layer relate among themselves, cut anew into
relation heads, so that neither widths nor attention heads need to be equal.

Where this departs from the paper, and why: the paper distils on general text and then fine-tunes; here the relations
are learned on the task's examples (`--supplementary` with `--text`: on text, as there), and the second phase has the
teacher's logits, so that it compares with `cr_ild` and `tinybert` by the first phase alone. `--hard-labels 1`
fine-tunes as the paper does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsebert.methods.base import check_setting
from sparsebert.methods.distilling import Relations, Term
from sparsebert.methods.layers_first import LayersFirst, LayersSettings, check_relation_heads

__all__ = ["MiniLM"]

_HEADS = 48


@dataclass(frozen=True)
class Settings(LayersSettings):
    """Settings of MiniLMv2's distillation."""

    relation_heads: int = 0
    """Relation heads; 0 takes 48, the paper's for a teacher of 768, or as many as the student has attention heads where
    48 does not divide the widths."""
    teacher_layer: int = 0
    """The teacher's layer that the student's last one learns from; 0 is the last (the paper's 21st of a BERT-large)."""


class MiniLM(LayersFirst):
    """Distils the relations of one layer, then the logits."""

    name = "minilm"
    summary = "MiniLMv2: the last layer's query, key and value relations, then the teacher's logits"
    Settings = Settings

    def check(self) -> None:
        super().check()
        check_relation_heads(self, self.heads())
        chosen, there = self.settings.teacher_layer, self.layers()[1]
        check_setting("teacher_layer", chosen, 0 <= chosen <= there, f"1 to {there}, or 0 for the last")

    def heads(self) -> int:
        """Relation heads as asked for; 0 where the student's attention heads decide."""
        asked = self.settings.relation_heads
        return asked or (0 if any(width % _HEADS for width in self.widths()) else _HEADS)

    def compares_hidden(self) -> bool:
        return False

    def layer_terms(self) -> Sequence[Term]:
        mine, theirs = self.layers()
        pairs = [(mine, self.settings.teacher_layer or theirs)]
        return [Relations(pairs, check_relation_heads(self, self.heads()))]
