"""Sparse Progressive Distillation (Huang et al., ACL 2022, arXiv 2110.08190).

A student with the weights of a fine-tuned teacher is pruned on the cubic schedule, then grafted: in every step each of
its layers runs with a probability that rises to 1, in a network whose other layers are the teacher's. What is trained,
on hidden states, attention maps and soft labels of the teacher, are the student's layers alone; embeddings, pooler
and head stay as the teacher has them.

Departures from the paper's released code, with their reasons:

* the probability reaches 1, by every schedule, and the student is trained alone to the end: with the published command
  it stays at 0.8 for ever, so that the network which is kept was almost never the one that was trained;
* the places of padding count in no loss: they say nothing of the task, and the fused losses leave them out;
* the difference of the embedding outputs is left out unless embeddings are masked: they are the teacher's own, and
  nothing that is trained could change it;
* the soft labels' loss is times temperature², which keeps the gradient's size (and changes nothing at the published
  temperature of 1). Its mean is over the classes too, as published: it is 1/classes of `kd`'s, and of spans 1/2;
* a step in which no layer would be the student's takes one all the same (see `GraftedPhase`);
* the teacher's layers run without dropout, so that they pass on what the loss compares with.

The regression's loss has the gold targets in place of soft labels, and classification and spans have no hard labels, as
published; `hard_label_weight` adds them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsebert.methods.base import Method, Phase, check_setting
from sparsebert.methods.distilling import AttentionMSE, Distillation, Hidden, Labels, Logits, Term, uniform_map
from sparsebert.methods.gmp import CubicSettings, check_cubic, prune_gradually
from sparsebert.methods.grafting import GraftedPhase, GraftSettings, check_grafting
from sparsebert.methods.phases import WEIGHTS_DEFAULTS
from sparsebert.models.capture import layers_of
from sparsebert.models.graft import check_graft, grafted, inherit
from sparsebert.models.task_model import TaskModel

__all__ = ["ProgressiveDistillation"]


@dataclass(frozen=True)
class Settings(GraftSettings, CubicSettings):
    """Settings of Sparse Progressive Distillation."""

    prune_until: float = 0.9
    """Share of the first phase's steps at which the target is reached; the rest trains what is left."""
    prunings: int = 11
    """How many times the mask is chosen anew after the first pruning, evenly spread."""
    graft_while_pruning: bool = True
    """Whether layers are grafted in the first phase too, at `graft_probability`, as published; else the student runs
    alone there."""
    hidden_weight: float = 1.0
    """Weight of the mean squared differences of the layers' hidden states, their sum over the layers."""
    attention_weight: float = 1.0
    """Weight of the mean squared differences of the attention maps, their sum over the layers."""
    soft_label_weight: float = 1.0
    """Weight of the cross-entropy with the teacher's soft labels, its mean over the classes (for a regression: of the
    squared difference to the gold targets)."""
    hard_label_weight: float = 0.0
    """Weight of the task's own loss."""
    temperature: float = 1.0
    """T of the soft labels."""
    dropout: bool = True
    """Whether the student's layers drop out while they learn, as published; the teacher's never do."""


class _GraftedDistillation(Distillation):
    """Distillation in which the student's network is a grafted one."""

    def __init__(self, phase: GraftedPhase, teacher: TaskModel, terms: list[Term]) -> None:
        super().__init__(phase.module.model, teacher, terms)
        self.phase = phase

    @torch.compiler.disable  # other layers in every step would be another graph in every step
    def __call__(self, batch: Any) -> dict[str, Tensor]:
        teacher = self.teach(batch)
        with grafted(self.student.base, self.teacher.base, self.phase.draw()):
            student = self.run(self.student, batch, self.student_needs)
        return {**student.logits, "loss": self.total(student, teacher)}


class _Graft(GraftedPhase):
    """Trains the pruned student while it takes the teacher's place."""

    def start(self) -> None:
        super().start()
        self.module.model.set_base_dropout(self.method.settings.dropout)
        self.objective = _GraftedDistillation(self, self.method.teacher, self.method.terms())  # type: ignore[attr-defined]
        self.module.objective = self.objective

    def logs(self) -> dict[str, float]:
        return {**super().logs(), **self.objective.logs(), "sparsity": self.method.masks.sparsity()}


class _Prune(_Graft):
    """The same at the first probability, while the smallest weights go."""

    def start(self) -> None:
        self.module.memory.zero_()
        self.method.inherit()  # type: ignore[attr-defined]
        super().start()

    def probability(self, step: int, total: int) -> float:
        settings = self.method.settings
        return settings.graft_probability if settings.graft_while_pruning else 1.0

    def after_step(self, step: int, total: int) -> bool:
        prune_gradually(self.method, step, total)
        return super().after_step(step, total)

    def finish(self) -> None:
        super().finish()
        # A phase cut short, by --max-steps 1 say, still ends at the target.
        masks, context = self.method.masks, self.method.context
        masks.select(masks.magnitude(), context.sparsity, context.allocation)
        masks.zero_pruned()


class ProgressiveDistillation(Method):
    """Prunes a copy of the teacher and distils it, layer by layer in the teacher's company."""

    name = "spd"
    summary = "sparse progressive distillation: prune a copy of the teacher, graft it layer by layer, distil"
    Settings = Settings
    defaults: ClassVar[dict[str, Any]] = {
        **WEIGHTS_DEFAULTS,
        "head": "linear",
        "allocation": "matrix",
        "untouched": False,
        "learning_rate": 1.6e-4,
        "num_train_epochs": 30.0,
        "warmup_steps": 0,
        "teacher_learning_rate": 3e-5,
        "teacher_epochs": 4.0,
    }

    @classmethod
    def wants_teacher(cls, settings: Any) -> bool:
        return True

    def check(self) -> None:
        super().check()
        settings = self.settings
        check_cubic(settings, self.context.sparsity)
        check_grafting(settings)
        t = settings.temperature
        check_setting("temperature", t, 0.0 < t < math.inf, "a positive number")
        names = [field.name for field in dataclasses.fields(settings) if field.name.endswith("_weight")]
        for name in names:
            weight = getattr(settings, name)
            check_setting(name, weight, 0.0 <= weight < math.inf, "zero or a positive number")
        total = sum(getattr(settings, name) for name in names)
        check_setting(names[0], settings.hidden_weight, total > 0.0, f"one of {', '.join(names)} above 0")
        check_graft(self.context.model, self.teacher)
        mine, theirs = self.layers()
        check_setting("teacher layers", theirs, mine == theirs, f"the student's {mine}, one for one")

    @property
    def teacher(self) -> TaskModel:
        """What is pruned a copy of."""
        assert self.context.teacher is not None  # Method.__init__ looked
        return self.context.teacher

    def layers(self) -> tuple[int, int]:
        """How many layers student and teacher have."""
        return len(layers_of(self.context.model.base)), len(layers_of(self.teacher.base))

    def inherit(self) -> None:
        """Makes the student a copy of the teacher."""
        inherit(self.context.model, self.teacher)

    def terms(self) -> list[Term]:
        """The loss: published weights times those of the settings."""
        settings, model = self.settings, self.context.model
        layers, _ = self.layers()
        masked = any(matrix.layer is None and matrix.component != "pooler" for matrix in self.context.matrices)
        states, maps = uniform_map(layers, layers, embeddings=masked), uniform_map(layers, layers)
        soft, hard = settings.soft_label_weight, settings.hard_label_weight
        if model.kind == "regression":
            soft, hard = 0.0, soft + hard
        terms: list[Term] = [
            # Both are means over the layers; the paper takes sums.
            Hidden(states, weight=settings.hidden_weight * len(states)),
            AttentionMSE(maps, weight=settings.attention_weight * len(maps)),
            Logits(settings.temperature, soft / model.num_labels),
            Labels(hard),
        ]
        return [term for term in terms if term.weight > 0.0]

    def phases(self) -> list[Phase]:
        return [*self.untouched_phases(), _Prune(self, "prune"), _Graft(self, "graft")]
