"""Distillation as an objective: teacher and student run once each, and terms compare what they leave.

Attention maps and hidden states come through the fused losses of `sparsebert.ops`; no map is ever stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsebert.errors import UserError
from sparsebert.models.capture import Capture, Needs, States
from sparsebert.models.task_model import TaskModel
from sparsebert.ops.attention_kl import attention_kl
from sparsebert.ops.attention_mse import attention_mse
from sparsebert.ops.hidden_cosine import hidden_cosine
from sparsebert.ops.hidden_mse import hidden_mse
from sparsebert.ops.relation_kl import relation_kl
from sparsebert.ops.soft_cross_entropy import soft_cross_entropy

__all__ = [
    "AttentionKL",
    "AttentionMSE",
    "Distillation",
    "Hidden",
    "Labels",
    "LayerMap",
    "Logits",
    "Outputs",
    "Relations",
    "Term",
    "last_layer",
    "projection",
    "uniform_map",
]

LayerMap = Sequence[tuple[int, int]]
"""Pairs of a student's and a teacher's layer, counted from 1; 0 is the embedding output."""


@dataclass
class Outputs:
    """What one model made of a batch."""

    states: States
    logits: dict[str, Tensor] = field(default_factory=dict)
    """`TaskModel.forward`'s, `loss` included where the batch has answers; empty where no term asks for logits."""
    token_mask: Tensor | None = None
    """`[batch, seq]` bool, True where there is a token."""


class Term(ABC):
    """One summand of a distillation loss.

    Args:
        weight: its factor.
    """

    name: ClassVar[str]
    """For the log."""
    wants_logits: ClassVar[bool] = False

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def needs(self) -> tuple[Needs, Needs]:
        """The states of student and teacher that it compares."""
        return Needs(), Needs()

    def trained(self) -> nn.Module | None:
        """What is trained beside the student, if anything."""
        return None

    @abstractmethod
    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        """The scalar, before its weight."""


class Labels(Term):
    """The task's own loss, on the hard labels."""

    name = "labels"
    wants_logits = True

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        return student.logits["loss"]


class Logits(Term):
    """Soft cross-entropy against the teacher's outputs, times T² (Hinton et al., 2015); the squared difference for a
    regression; for spans the mean of start's and end's over the tokens.

    Args:
        temperature: T.
        weight: its factor.
    """

    name = "logits"
    wants_logits = True

    def __init__(self, temperature: float = 1.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.temperature = temperature

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        s, t = student.logits, teacher.logits
        if "logits" not in s:
            pairs = [(s[name], t[name]) for name in ("start_logits", "end_logits")]
            return sum(soft_cross_entropy(a, b, temperature=self.temperature) for a, b in pairs) / 2  # type: ignore[return-value]
        if s["logits"].dim() == 1:
            return F.mse_loss(s["logits"], t["logits"])
        return soft_cross_entropy(s["logits"], t["logits"], temperature=self.temperature)


class Hidden(Term):
    """Mean squared difference, or 1 - cosine, of mapped layers' hidden states, the mean over the layers.

    Args:
        pairs: which layers.
        measure: `mse` or `cosine`.
        project: a linear to the teacher's width, trained beside the student; None where the widths are equal.
        padding: whether padded places count too.
        weight: its factor.
    """

    name = "hidden"

    def __init__(
        self,
        pairs: LayerMap,
        measure: str = "mse",
        project: nn.Module | None = None,
        padding: bool = False,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        self.pairs = tuple(pairs)
        self.measure = {"mse": hidden_mse, "cosine": hidden_cosine}[measure]
        self.project = project
        self.padding = padding

    def needs(self) -> tuple[Needs, Needs]:
        student, teacher = zip(*self.pairs, strict=True)
        return Needs(hidden=frozenset(student)), Needs(hidden=frozenset(teacher))

    def trained(self) -> nn.Module | None:
        return self.project

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        mine = [student.states.hidden[layer] for layer, _ in self.pairs]
        if self.project is not None:
            mine = [self.project(state.float()) for state in mine]
        theirs = [teacher.states.hidden[layer] for _, layer in self.pairs]
        return self.measure(mine, theirs, None if self.padding else student.token_mask)


class _Maps(Term):
    """What the two losses on attention maps share; the mean over the mapped layers.

    Args:
        pairs: which layers, counted from 1.
        weight: its factor.
    """

    name = "attention"

    def __init__(self, pairs: LayerMap, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.pairs = tuple(pairs)

    def needs(self) -> tuple[Needs, Needs]:
        student, teacher = zip(*self.pairs, strict=True)
        return Needs(attention=frozenset(student)), Needs(attention=frozenset(teacher))

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        losses = [
            self._layer(
                student.states.query[mine],
                student.states.key[mine],
                teacher.states.query[theirs],
                teacher.states.key[theirs],
                student.token_mask,
            )
            for mine, theirs in self.pairs
        ]
        return torch.stack(losses).mean()

    @abstractmethod
    def _layer(self, q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor, mask: Tensor | None) -> Tensor: ...


class AttentionKL(_Maps):
    """KL divergence between attention maps (CR-ILD, MiniLM)."""

    def _layer(self, q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor, mask: Tensor | None) -> Tensor:
        return attention_kl(q, k, teacher_q, teacher_k, mask)


class AttentionMSE(_Maps):
    """Mean squared difference of attention maps.

    Args:
        pairs: which layers, counted from 1.
        on: `probabilities` (SPD) or `scores` (TinyBERT).
        weight: its factor.
    """

    def __init__(self, pairs: LayerMap, on: str = "probabilities", weight: float = 1.0) -> None:
        super().__init__(pairs, weight)
        self.on = on

    def _layer(self, q: Tensor, k: Tensor, teacher_q: Tensor, teacher_k: Tensor, mask: Tensor | None) -> Tensor:
        return attention_mse(q, k, teacher_q, teacher_k, mask, on=self.on)


class Relations(Term):
    """KL divergences between the self-relations of queries, keys and values (MiniLMv2), their sum over the three and
    the mean over the layers. Widths and attention heads may differ.

    Args:
        pairs: which layers, counted from 1.
        heads: relation heads; must divide both widths.
        of: which of `query`, `key`, `value`.
        weight: its factor.
    """

    name = "relations"

    def __init__(
        self, pairs: LayerMap, heads: int, of: Sequence[str] = ("query", "key", "value"), weight: float = 1.0
    ) -> None:
        super().__init__(weight)
        self.pairs = tuple(pairs)
        self.heads = heads
        self.of = tuple(of)

    def needs(self) -> tuple[Needs, Needs]:
        student, teacher = (frozenset(layers) for layers in zip(*self.pairs, strict=True))
        maps, values = {"query", "key"} & set(self.of), "value" in self.of
        nothing: frozenset[int] = frozenset()
        return (
            Needs(attention=student if maps else nothing, values=student if values else nothing),
            Needs(attention=teacher if maps else nothing, values=teacher if values else nothing),
        )

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        losses = [
            relation_kl(
                getattr(student.states, kind)[mine],
                getattr(teacher.states, kind)[theirs],
                student.token_mask,
                self.heads,
            )
            for kind in self.of
            for mine, theirs in self.pairs
        ]
        return torch.stack(losses).sum() / len(self.pairs)


class Distillation:
    """A training objective: `student` learns from `teacher` by the weighted sum of terms.

    The teacher runs in eval mode without gradients. The head of neither runs where no term asks for logits.

    Args:
        student: in training.
        teacher: dense, frozen here.
        terms: at least one.

    Raises:
        ValueError: no term, or a layer that a model does not have.
    """

    def __init__(self, student: TaskModel, teacher: TaskModel, terms: Sequence[Term]) -> None:
        if not terms:
            raise ValueError("terms: expected at least one")
        self.student, self.teacher, self.terms = student, teacher, tuple(terms)
        self.wants_logits = any(term.wants_logits for term in terms)
        self.student_needs, self.teacher_needs = Needs(), Needs()
        for term in terms:
            mine, theirs = term.needs()
            self.student_needs |= mine
            self.teacher_needs |= theirs
        Capture(student.base, self.student_needs)
        Capture(teacher.base, self.teacher_needs)
        teacher.requires_grad_(False)
        teacher.eval()
        self.parts: dict[str, Tensor] = {}
        """Each term's newest value, weighted; for the log."""

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`loss` (scalar fp32) and, where the heads ran, the student's logits."""
        teacher = self.teach(batch)
        student = self.run(self.student, batch, self.student_needs)
        return {**student.logits, "loss": self.total(student, teacher)}

    @torch.no_grad()
    def teach(self, batch: Mapping[str, Tensor], around: AbstractContextManager[Any] | None = None) -> Outputs:
        """The teacher's outputs for a batch; `around` as for `run`."""
        return self.run(self.teacher, batch, self.teacher_needs, around)

    def run(
        self,
        model: TaskModel,
        batch: Mapping[str, Tensor],
        needs: Needs,
        around: AbstractContextManager[Any] | None = None,
    ) -> Outputs:
        """One forward pass of a model, its states taken, under `around` (an intervention by hooks, say)."""
        mask = batch.get("attention_mask")
        token_mask = None if mask is None else mask.bool()
        with around or nullcontext(), Capture(model.base, needs) as capture:
            if self.wants_logits:
                logits = model(**batch)
            else:
                model.encode(batch["input_ids"], mask, batch.get("token_type_ids"))
                logits = {}
        return Outputs(capture.states, logits, token_mask)

    def total(self, student: Outputs, teacher: Outputs) -> Tensor:
        """The weighted sum of the terms."""
        losses: dict[str, Any] = {}
        with torch.autocast(device_type=_device_type(student), enabled=False):
            for term in self.terms:
                losses[term.name] = losses.get(term.name, 0.0) + term.weight * term.loss(student, teacher)
            self.parts = {name: value.detach() for name, value in losses.items()}
            return sum(losses.values())  # type: ignore[return-value]

    def logs(self) -> dict[str, float]:
        """The newest value of every term, weighted."""
        return {f"{name}_loss": float(value) for name, value in self.parts.items()}


def _device_type(outputs: Outputs) -> str:
    tensors = [*outputs.logits.values(), *outputs.states.hidden.values(), *outputs.states.query.values()]
    tensors += outputs.states.value.values()
    return tensors[0].device.type


def uniform_map(student: int, teacher: int, embeddings: bool = False) -> list[tuple[int, int]]:
    """Every student layer with the teacher's at the same share of the depth: layer l with l * teacher / student.

    Args:
        student: number of layers.
        teacher: number of layers, a multiple of the student's.
        embeddings: whether the embedding outputs are a pair too.

    Raises:
        UserError: layers that cannot be mapped.
    """
    if student < 1 or teacher % student:
        raise UserError(
            f"a student of {student} layers cannot be mapped to a teacher of {teacher}: expected a divisor of "
            f"{teacher}, or a method that distils the last layer"
        )
    step = teacher // student
    return [(layer, layer * step) for layer in range(0 if embeddings else 1, student + 1)]


def last_layer(student: int, teacher: int) -> list[tuple[int, int]]:
    """The last layers alone."""
    return [(student, teacher)]


def projection(student: int, teacher: int, seed: int) -> nn.Linear | None:
    """A linear from the student's width to the teacher's, N(0, 0.02) and no bias; None where they are equal."""
    if student == teacher:
        return None
    linear = nn.Linear(student, teacher, bias=False)
    nn.init.normal_(linear.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
    return linear
