"""Static model pruning (Jiang et al., 2022, arXiv 2210.06210): a task is learned by pruning alone, taught by a teacher.

Weights, biases and layer norms stay as they were pre-trained. Scores start at 0 and follow the first-order gradient of
`movement`, dL/dS = dL/dW' * W; a cubic schedule without warm-up says how many of the highest are kept. It learns from
labels and a fine-tuned dense teacher (`--no-kd`: from labels alone).

Where this departs from the paper, and why:

- *Head*: trained. The paper takes the rows of the masked-language-model head for words chosen by hand for each class
  (yes, no, maybe), so that nothing but scores is trained; that needs such words, a classification and that head.
- *Penalty*: none; the paper adds 400 times the mean sigmoid(score), which serves its own division of the sparsity among
  matrices (SMP-S, by each matrix's share of sigmoid(score)). Here `--allocation` divides: `matrix` is the paper's
  SMP-L, `global` ranks all scores together.
- *Dropout*: off in the frozen base, as for every method that trains no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sparsebert.methods.base import Phase
from sparsebert.methods.movement import ScorePhase, ScoreSettings, check_scores
from sparsebert.methods.phases import HEAD_DEFAULTS, HeadPhase
from sparsebert.methods.teachable import Teachable, TeachableSettings

__all__ = ["StaticPruning"]


@dataclass(frozen=True)
class Settings(ScoreSettings, TeachableSettings):
    """Settings of static model pruning."""

    score_learning_rate: float = 2e-2
    """Learning rate of the scores; the schedule is Trainer's."""
    prune_from: float = 0.0
    """Share of the steps before the first unit is pruned."""
    prune_until: float = 0.6
    """Share of the steps at which the target is reached; the rest trains at the target."""
    kd: bool = True
    """Whether to train on a teacher's soft labels too, by the weights of `temperature` and `hard_labels`. The teacher
    is dense: the one of --teacher, or one that is fine-tuned first."""


class _Scores(ScorePhase, HeadPhase):
    """Trains scores and head; weights are frozen."""

    def start(self) -> None:
        super().start()
        self.method.new_head()


class StaticPruning(Teachable):
    """A mask over frozen weights, and a head, learned from labels and a teacher."""

    name = "smp"
    summary = "static model pruning: weights frozen, a mask learned by first-order scores from a teacher"
    Settings = Settings
    defaults: ClassVar[dict[str, Any]] = {**HEAD_DEFAULTS, "max_grad_norm": 0.0}

    def check(self) -> None:
        super().check()
        check_scores(self.settings)

    def phases(self) -> list[Phase]:
        return [*self.untouched_phases(), _Scores(self, "prune")]
