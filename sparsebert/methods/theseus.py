"""BERT-of-Theseus (Xu et al., EMNLP 2020, arXiv 2002.02925).

Each layer of a student takes, in every step with some probability, the place of the teacher's layers that it stands
for; then the student is fine-tuned alone. The task's own loss is the only one. In the first phase the student's layers
alone are trained: embeddings, pooler and head are the teacher's.

Departures from the released code, with their reasons:

* the two stages are phases of one length each, with a schedule of the learning rate each; the released code goes from
  one to the other within one schedule, at a step that depends on the size of the task;
* the second phase trains all of the student, as the paper says, embeddings and head included; the code its layers
  alone;
* a step in which no layer would be the student's takes one all the same (see `GraftedPhase`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sparsebert.errors import UserError
from sparsebert.methods.base import Phase
from sparsebert.methods.grafting import GraftedPhase, GraftSettings, check_grafting
from sparsebert.methods.phases import WeightsPhase, freeze
from sparsebert.methods.student import STUDENT_DEFAULTS, StudentMethod, StudentSettings
from sparsebert.models.graft import check_graft, grafted, inherit

__all__ = ["Theseus"]


@dataclass(frozen=True)
class Settings(GraftSettings, StudentSettings):
    """Settings of BERT-of-Theseus."""

    graft_probability: float = 0.3
    """Probability that a layer is the student's in a forward pass, where replacing begins; else the teacher's layers
    that it stands for run."""
    graft_schedule: Literal["constant", "linear", "mixed"] = "linear"
    """How it goes on from there: `constant`; `linear`, rising to 1; or `mixed`, constant and then rising."""
    graft_until: float = 1.0
    """Share of the first phase's steps after which the student runs alone, by every schedule."""


class _Replace(GraftedPhase):
    """Trains the student's layers in the teacher's company."""

    def start(self) -> None:
        self.module.memory.zero_()
        inherit(self.module.model, self.method.teacher)  # type: ignore[attr-defined]
        super().start()
        teacher = self.method.teacher  # type: ignore[attr-defined]
        teacher.requires_grad_(False)
        # As published, its layers drop out as the student's do.
        teacher.train()
        self.module.objective = self.objective

    @torch.compiler.disable  # other layers in every step would be another graph in every step
    def objective(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The task's loss of the grafted network."""
        model, teacher = self.module.model, self.method.teacher  # type: ignore[attr-defined]
        with grafted(model.base, teacher.base, self.draw()):
            return model(**batch)


class _Alone(WeightsPhase):
    """Fine-tunes the student; its head goes on from where it is."""

    def start(self) -> None:
        freeze(self.module)
        self.module.model.requires_grad_(True)
        self.module.model.set_base_dropout(True)


class Theseus(StudentMethod):
    """Replaces groups of the teacher's layers by one layer each."""

    name = "theseus"
    summary = "BERT-of-Theseus: a student of fewer layers that replaces the teacher's group by group"
    Settings = Settings
    defaults: ClassVar[dict[str, Any]] = {**STUDENT_DEFAULTS, "learning_rate": 2e-5, "warmup_steps": 0}

    def check(self) -> None:
        super().check()
        check_grafting(self.settings)
        if self.context.model.head_kind != "linear":
            raise UserError(
                "head mlp: it looks at every layer, and theseus changes their number while it trains; use --head linear"
            )
        check_graft(self.context.model, self.teacher)

    def phases(self) -> list[Phase]:
        return [_Replace(self, "replace"), _Alone(self, "finetune")]
