"""MixKD (Liang et al., 2021): soft and hard labels on the examples, and on mixes of each two of them.

Two examples are mixed at the embedding outputs; the student learns both labels by their shares, and what the teacher
makes of the same mix.

Where this departs from the paper, and why: soft labels are compared by the cross-entropy that `kd` has, in place of the
squared difference of logits, so that the two methods differ by the mixes alone; partners are the batch reversed and one
share is drawn a batch (as CR-ILD's code has it), in place of a share an example; no back-translated data. Weights and
alpha are 1, as in CR-ILD, where the paper's own could not be checked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from sparsebert.errors import UserError
from sparsebert.methods.base import Phase, check_setting
from sparsebert.methods.distilling import Distillation, Term
from sparsebert.methods.kd import LogitSettings, check_logits, logit_terms
from sparsebert.methods.mixup import Mixup, both_masks, mixed_embeddings
from sparsebert.methods.student import DistillPhase, StudentMethod, StudentSettings
from sparsebert.models.task_model import TaskModel

__all__ = ["MixDistil"]


@dataclass(frozen=True)
class Settings(LogitSettings, StudentSettings):
    """Settings of MixKD."""

    mixed: float = 1.0
    """Weight of the loss on mixed examples; that on the examples themselves has 1."""
    mixup_alpha: float = 1.0
    """The share of an example in its mix is drawn from Beta(a, a) with this a, and then the larger part."""


class MixedLogits(Distillation):
    """The terms on a batch, and again on the batch mixed with its reverse.

    Args:
        student, teacher, terms: as for `Distillation`.
        mixup: draws the shares.
        weight: of the mixed batch.
    """

    def __init__(
        self, student: TaskModel, teacher: TaskModel, terms: Sequence[Term], mixup: Mixup, weight: float
    ) -> None:
        super().__init__(student, teacher, terms)
        self.mixup, self.weight = mixup, weight

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        result = super().__call__(batch)
        if not self.weight:
            return result
        real, share = self.parts, self.mixup.draw()
        mixed = both_masks(batch)
        labels = mixed.pop("labels")
        teacher = self.teach(mixed, mixed_embeddings(self.teacher.base, share))
        student = self.run(self.student, mixed, self.student_needs, mixed_embeddings(self.student.base, share))
        logits = student.logits["logits"]
        loss = F.mse_loss if self.student.kind == "regression" else F.cross_entropy
        both = (loss(logits, target.float() if loss is F.mse_loss else target) for target in (labels, labels.flip(0)))
        mine, partner = both
        student.logits["loss"] = share * mine + (1.0 - share) * partner
        total = result["loss"] + self.weight * self.total(student, teacher)
        self.parts = {**real, **{f"mixed_{name}": self.weight * value for name, value in self.parts.items()}}
        return {**result, "loss": total}


class _Distill(DistillPhase):
    def start(self) -> None:
        super().start()
        self.module.memory.zero_()

    def terms(self) -> Sequence[Term]:
        return logit_terms(self.method.settings)

    def make(self, terms: Sequence[Term]) -> Distillation:
        method = self.method
        assert isinstance(method, MixDistil)
        mixup = Mixup(method.context.seed, self.module.memory, alpha=method.settings.mixup_alpha)
        return MixedLogits(self.module.model, method.teacher, terms, mixup, method.settings.mixed)


class MixDistil(StudentMethod):
    """Trains a student on soft and hard labels of examples and of their mixes."""

    name = "mix_kd"
    summary = "MixKD: knowledge distillation on the examples and on mixes of each two of them"
    Settings = Settings

    def check(self) -> None:
        super().check()
        settings = self.settings
        check_logits(settings.temperature, settings.hard_labels)
        check_setting("mixed", settings.mixed, 0.0 <= settings.mixed < math.inf, "a weight of 0 or more")
        alpha = settings.mixup_alpha
        check_setting("mixup_alpha", alpha, 0.0 < alpha < math.inf, "a positive number")
        if self.context.model.kind == "span":
            raise UserError("method mix_kd: spans of a text cannot be mixed; use --method cr_ild or kd")

    def phases(self) -> list[Phase]:
        return [_Distill(self)]
