"""Distillation in two phases, what `cr_ild`, `tinybert`, `minilm` and `bert_emd` share: a student's layers learn from
the teacher's, without labels or logits; then the whole student learns the teacher's logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsebert.methods.base import Phase, TrainingModule, check_setting
from sparsebert.methods.distilling import Term, projection
from sparsebert.methods.kd import LogitSettings, check_logits, logit_terms
from sparsebert.methods.student import STUDENT_DEFAULTS, DistillPhase, StudentMethod, StudentSettings
from sparsebert.models.prunable import heads_of, prunable_matrices

__all__ = ["LAYERS_FIRST_DEFAULTS", "LayersFirst", "LayersPhase", "LayersSettings"]

LAYERS_FIRST_DEFAULTS: dict[str, Any] = {
    **STUDENT_DEFAULTS,
    "learning_rate": 3e-5,
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
}
"""Defaults of the second phase, and of the schedule of both."""


@dataclass(frozen=True)
class LayersSettings(LogitSettings, StudentSettings):
    """Settings of a method that distils layers (phase `ild`) before logits (phase `kd`)."""

    hard_labels: float = 0.0
    """Weight of the task's own loss in the phase on logits; the soft one has the rest of 1."""
    ild_epochs: float = 20.0
    """Epochs of the phase on layers, where no --max-steps is given; --num-train-epochs is for the phase on logits."""
    ild_learning_rate: float = 3e-5
    """Learning rate of the phase on layers; 0 takes --learning-rate."""
    ild_batch_size: int = 32
    """Examples of a step on each device in the phase on layers; 0 takes --per-device-train-batch-size."""
    supplementary: bool = False
    """Whether the phase on layers trains on --text in place of the task's examples."""


class LayersPhase(DistillPhase):
    """Trains the student's layers on `LayersFirst.layer_terms`."""

    def __init__(self, method: LayersFirst) -> None:
        super().__init__(method, "ild")
        self.layered = method
        if method.settings.supplementary:
            self.data = "text"

    def training(self) -> dict[str, Any]:
        settings = self.method.settings
        # The head is not trained here: a score of what is held out would say nothing, nor choose a checkpoint.
        own: dict[str, Any] = {"eval_strategy": "no", "load_best_model_at_end": False, "eval_on_start": False}
        own["num_train_epochs"] = settings.ild_epochs
        if settings.ild_learning_rate:
            own["learning_rate"] = settings.ild_learning_rate
        if settings.ild_batch_size:
            own["per_device_train_batch_size"] = settings.ild_batch_size
        return {**super().training(), **own}

    def terms(self) -> Sequence[Term]:
        return self.layered.layer_terms()


class LogitsPhase(DistillPhase):
    """Trains the whole student on the teacher's logits."""

    def __init__(self, method: LayersFirst) -> None:
        super().__init__(method, "kd")

    def terms(self) -> Sequence[Term]:
        return logit_terms(self.method.settings)


class LayersFirst(StudentMethod):
    """A method that distils layers, then logits. Subclasses say what of the layers is compared."""

    defaults = LAYERS_FIRST_DEFAULTS

    def check(self) -> None:
        super().check()
        settings = self.settings
        check_logits(settings.temperature, settings.hard_labels)
        epochs, rate, batch = settings.ild_epochs, settings.ild_learning_rate, settings.ild_batch_size
        check_setting("ild_epochs", epochs, 0.0 < epochs < math.inf, "a positive number of epochs")
        check_setting("ild_learning_rate", rate, 0.0 <= rate < math.inf, "0 (as --learning-rate) or a positive number")
        check_setting("ild_batch_size", batch, batch >= 0, "0 (as --per-device-train-batch-size) or a positive number")

    def build(self) -> TrainingModule:
        module = super().build()
        if self.compares_hidden():
            project = projection(*self.widths(), self.context.seed)
            if project is not None:
                module.extra["project"] = project
        return module

    @property
    def project(self) -> Any:
        """The linear from the student's width to the teacher's, None where they are equal."""
        return getattr(self.module.extra, "project", None)

    def compares_hidden(self) -> bool:
        """Whether hidden states are compared, so that a narrower student's must be brought to the teacher's width."""
        return True

    def layer_terms(self) -> Sequence[Term]:
        """What the first phase compares."""
        raise NotImplementedError

    def first_phase(self) -> Phase:
        """The phase on layers."""
        return LayersPhase(self)

    def phases(self) -> list[Phase]:
        return [self.first_phase(), LogitsPhase(self)]


def check_relation_heads(method: StudentMethod, heads: int) -> int:
    """Relation heads as they are used; 0 asks for as many as the student has attention heads.

    Raises:
        UserError: a number that does not divide the widths of all layers.
    """
    bases = method.context.model.base, method.teacher.base
    # Of queries, keys and values; layers that lost heads are narrower.
    widths = [matrix.shape[0] for base in bases for matrix in prunable_matrices(base) if matrix.component == "query"]
    used = heads or heads_of(bases[0])[0]
    fits = used >= 1 and all(width % used == 0 for width in widths)
    named = " and ".join(map(str, dict.fromkeys(widths)))
    check_setting("relation_heads", used, fits, f"a divisor of {math.gcd(*widths)} (widths {named})")
    return used
