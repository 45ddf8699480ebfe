"""Patient knowledge distillation (Sun et al., 2019): soft and hard labels, and the [CLS] states of layers in between.

The patient loss is the mean squared difference of [CLS] states of length 1, over examples, layers and width. The last
layer has none: the logits speak for it. The paper searches temperature, weights and learning rate per task; the
defaults here are the middle of its grids (5 to 20; 0.2 to 0.7; 10 to 1000).

A student of one layer has no layer in between: its only one then learns from the teacher's last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from sparsebert.errors import UserError, unknown
from sparsebert.methods.base import Phase, check_setting
from sparsebert.methods.distilling import LayerMap, Outputs, Term, last_layer, uniform_map
from sparsebert.methods.kd import LogitSettings, check_logits, logit_terms
from sparsebert.methods.student import STUDENT_DEFAULTS, DistillPhase, StudentMethod, StudentSettings
from sparsebert.models.capture import Needs

__all__ = ["Patient", "PatientDistil"]

_LAYERS = ("skip", "last")


@dataclass(frozen=True)
class Settings(LogitSettings, StudentSettings):
    """Settings of patient distillation."""

    temperature: float = 10.0
    patience: float = 100.0
    """Weight of the loss on [CLS] states (the paper's beta)."""
    layers: Literal["skip", "last"] = "skip"
    """The teacher's layers: `skip`, every k-th; `last`, those right below its last."""


class Patient(Term):
    """Mean squared difference of mapped layers' first states, each of length 1.

    Args:
        pairs: which layers.
        weight: its factor.
    """

    name = "patience"

    def __init__(self, pairs: LayerMap, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.pairs = tuple(pairs)

    def needs(self) -> tuple[Needs, Needs]:
        student, teacher = zip(*self.pairs, strict=True)
        return Needs(hidden=frozenset(student)), Needs(hidden=frozenset(teacher))

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        losses = [
            F.mse_loss(_first(student.states.hidden[mine]), _first(teacher.states.hidden[theirs]))
            for mine, theirs in self.pairs
        ]
        return sum(losses) / len(losses)  # type: ignore[return-value]


def _first(state: Tensor) -> Tensor:
    return F.normalize(state[:, 0].float(), dim=-1)


class _Distill(DistillPhase):
    def __init__(self, method: PatientDistil) -> None:
        super().__init__(method)
        self.pairs = method.pairs()

    def terms(self) -> Sequence[Term]:
        settings = self.method.settings
        patient = [Patient(self.pairs, settings.patience)] if settings.patience else []
        return [*logit_terms(settings), *patient]


class PatientDistil(StudentMethod):
    """Trains a student on soft and hard labels and on layers in between."""

    name = "pkd"
    summary = "patient distillation: soft and hard labels, and the [CLS] states of layers in between"
    Settings = Settings
    defaults = {**STUDENT_DEFAULTS, "num_train_epochs": 4.0}  # noqa: RUF012 (a Mapping in the base)

    def check(self) -> None:
        super().check()
        settings = self.settings
        check_logits(settings.temperature, settings.hard_labels)
        weight = settings.patience
        check_setting("patience", weight, 0.0 <= weight < math.inf, "a weight of 0 or more")
        if settings.layers not in _LAYERS:
            raise unknown("layers", settings.layers, _LAYERS)
        mine, theirs = self.widths()
        if mine != theirs:
            raise UserError(
                f"method pkd: the student is {mine} wide and its teacher {theirs}; expected equal widths, or use "
                "--method tinybert, which learns a linear between them"
            )
        self.pairs()

    def pairs(self) -> LayerMap:
        """The layers that are compared."""
        mine, theirs = self.layers()
        if mine == 1:
            return last_layer(mine, theirs)
        if self.settings.layers == "skip":
            return uniform_map(mine, theirs)[:-1]
        if mine > theirs:
            raise UserError(f"a student of {mine} layers cannot be mapped to a teacher of {theirs}: expected fewer")
        return [(layer, theirs - mine + layer) for layer in range(1, mine)]

    def phases(self) -> list[Phase]:
        return [_Distill(self)]
