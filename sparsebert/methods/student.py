"""A dense student that learns from a teacher: what `kd`, `cr_ild` and their like share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsebert.errors import UserError
from sparsebert.methods.base import Method, Phase, check_setting
from sparsebert.methods.distilling import Distillation, Term
from sparsebert.methods.phases import WEIGHTS_DEFAULTS, WeightsPhase, check_head_rate
from sparsebert.models.capture import Needs, layers_of
from sparsebert.models.cut import keep_first_layers
from sparsebert.models.prunable import heads_of, layout_of
from sparsebert.models.task_model import TaskModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["STUDENT_DEFAULTS", "DistillPhase", "StudentMethod", "StudentSettings"]

STUDENT_DEFAULTS: dict[str, Any] = {**WEIGHTS_DEFAULTS, "head": "linear"}
"""Defaults of methods that train a student: BERT's own head, whose pooler is fine-tuned too."""


@dataclass(frozen=True)
class StudentSettings:
    """Settings of every method that trains a student."""

    student_layers: int = 0
    """Layers of the student: the first so many of `--model`; 0 takes half of them, -1 all (a smaller checkpoint)."""
    head_learning_rate: float = 0.0
    """Learning rate of the new head; 0 takes --learning-rate for it too."""


class DistillPhase(WeightsPhase):
    """Trains base and head of the student on the weighted sum of terms.

    Args:
        method: whose module is trained.
        name: of the phase.
        new_head: whether the head starts from its first values.
    """

    def __init__(self, method: Method, name: str = "distill", *, new_head: bool = True) -> None:
        super().__init__(method, name)
        self.new_head = new_head

    def terms(self) -> Sequence[Term]:
        """What is compared; asked once, when the phase starts."""
        raise NotImplementedError

    def start(self) -> None:
        head = {name: tensor.clone() for name, tensor in self.module.model.head.state_dict().items()}
        super().start()
        if not self.new_head:
            self.module.model.head.load_state_dict(head)
        self.objective = self.make(self.terms())
        self.module.objective = self.objective
        if not self.objective.wants_logits:
            # No gradient reaches the head, nor a pooler that only it looks at; DDP would wait for them.
            self.module.model.head.requires_grad_(False)
            pooler = getattr(self.module.model.base, "pooler", None)
            if pooler is not None:
                pooler.requires_grad_(False)
            freeze_unreached(self.module.model.base, self.objective.student_needs)
        for term in self.objective.terms:
            if (beside := term.trained()) is not None:
                beside.requires_grad_(True)

    def make(self, terms: Sequence[Term]) -> Distillation:
        """The objective over `terms`."""
        teacher = self.method.context.teacher
        assert teacher is not None  # Method.__init__ looked
        return Distillation(self.module.model, teacher, terms)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        groups = super().parameter_groups(learning_rate)
        if not self.objective.wants_logits:
            groups[1]["params"] = []
        extra = [p for p in self.module.extra.parameters() if p.requires_grad]
        return [*groups, {"params": extra, "lr": learning_rate}] if extra else groups

    def logs(self) -> dict[str, float]:
        return {**super().logs(), **self.objective.logs()}

    def finish(self) -> None:
        super().finish()
        self.module.objective = None


def freeze_unreached(base: PreTrainedModel, needs: Needs) -> None:
    """Takes what lies above the states in `needs` out of training: a loss on them has no gradient for it."""
    names = dict(layout_of(base).linears)
    for number, layer in enumerate(layers_of(base), 1):
        if any(at >= number for at in needs.hidden) or any(at > number for at in needs.attention | needs.values):
            continue
        layer.requires_grad_(False)
        for name, layers in (("query", needs.attention), ("key", needs.attention), ("value", needs.values)):
            if number in layers:
                layer.get_submodule(names[name]).requires_grad_(True)


class StudentMethod(Method):
    """A method whose result is a dense student."""

    defaults = STUDENT_DEFAULTS
    sparsifies = False

    @classmethod
    def wants_teacher(cls, settings: Any) -> bool:
        return True

    @classmethod
    def shape(cls, base: PreTrainedModel, settings: Any) -> None:
        wanted, there = settings.student_layers, len(layers_of(base))
        check_setting("student_layers", wanted, wanted >= -1, "a number of layers, 0 for half of them, -1 for all")
        if wanted >= 0:
            keep_first_layers(base, wanted or max(1, there // 2))

    def check(self) -> None:
        super().check()
        check_head_rate(self.settings.head_learning_rate)

    @property
    def teacher(self) -> TaskModel:
        """The model that is learned from."""
        assert self.context.teacher is not None
        return self.context.teacher

    def layers(self) -> tuple[int, int]:
        """How many layers student and teacher have."""
        return len(layers_of(self.context.model.base)), len(layers_of(self.teacher.base))

    def check_heads(self, instead: str) -> None:
        """Raises a UserError unless student and teacher have as many attention heads, which attention maps need.

        Args:
            instead: what to ask for where they have not.
        """
        mine, theirs = (sorted(set(heads_of(model.base))) for model in (self.context.model, self.teacher))
        if mine != theirs or len(mine) > 1:
            here, there = (" or ".join(map(str, heads)) for heads in (mine, theirs))
            raise UserError(
                f"method {self.name}: attention maps of {here} heads (student) and {there} (teacher) cannot be "
                f"compared; {instead}"
            )

    def check_width(self) -> None:
        """Raises a UserError where the student's states are wider than the teacher's."""
        mine, theirs = self.widths()
        if mine > theirs:
            raise UserError(
                f"method {self.name}: the student is {mine} wide and its teacher {theirs}; expected a teacher at least "
                "as wide (--teacher-model)"
            )

    def widths(self) -> tuple[int, int]:
        """Widths of the states of student and teacher."""
        return int(self.context.model.base.config.hidden_size), int(self.teacher.base.config.hidden_size)

    def phases(self) -> list[Phase]:
        raise NotImplementedError
