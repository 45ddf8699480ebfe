"""CR-ILD (Ko et al., 2023, arXiv 2302.01530): intermediate-layer distillation that does not over-fit a small task.

Phase `ild`, without labels or logits: the student's last layer learns the attention maps and the hidden states of the
teacher's last one (all layers over-fit, the paper finds), on batches mixed with their reverse at the embedding outputs.
What the student makes of the mix must also agree with what it makes of the two parts by themselves (consistency), more
so towards the end: the weight rises linearly from 0. Phase `kd`: the whole student learns the teacher's logits.

`--layers uniform`, `--no-mixup --consistency 0` and `--objective` are the paper's ablations; `--supplementary` with
`--text` its other remedy, layers distilled on other data than the task's.

What is known of the published settings, and where this departs from them:

- The released script never runs its consistency terms (they stand in the branches of objectives that it does not
  choose). Here they run whenever there is mixup, for whatever the objective compares; `--objective relations
  --consistency 0` is the script's own computation.
- *Consistency* compares the mix with a part over the part's own tokens, so the mix's map is renormalised over them: of
  the partner's padding there is nothing to agree with. The parts go through the network as the mix does, dropout on.
- *ILD epochs* are 20 on every task; the paper has 10 for SST-2 and QNLI, 5 for MNLI and QQP (`--ild-epochs`).
- The student's average over time as the target of the consistency (`--use_ema` of the script) is left out.
- The teacher that a run trains for itself has `finetune`'s batches of 32, where the paper's has 16.
- One share and one order of partners are drawn per batch, the same on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsebert.errors import UserError, unknown
from sparsebert.methods.base import Phase, check_setting
from sparsebert.methods.distilling import (
    AttentionKL,
    Distillation,
    Hidden,
    LayerMap,
    Outputs,
    Relations,
    Term,
    last_layer,
    uniform_map,
)
from sparsebert.methods.layers_first import (
    LAYERS_FIRST_DEFAULTS,
    LayersFirst,
    LayersPhase,
    LayersSettings,
    check_relation_heads,
)
from sparsebert.methods.mixup import Mixup, both_masks, mixed_embeddings
from sparsebert.models.capture import Needs, States
from sparsebert.models.task_model import TaskModel

__all__ = ["ConsistentLayers"]

OBJECTIVES = ("attention", "hidden", "relations")
_LAYERS = ("last", "uniform")

# Places in the training module's `memory`.
_DRAWN, _RAMP = 0, 1


@dataclass(frozen=True)
class Settings(LayersSettings):
    """Settings of CR-ILD."""

    objective: str = "attention+hidden"
    """What of the layers is compared: `attention` (KL of the maps), `hidden` (squared difference of the states),
    `relations` (KL of query, key and value relations), joined by +."""
    layers: Literal["last", "uniform"] = "last"
    """Which layers: the last ones, or every student layer with the teacher's at the same share of the depth."""
    relation_heads: int = 0
    """Heads of the relations; 0 takes the student's attention heads."""
    mixup: bool = True
    """Whether each batch is mixed with its reverse."""
    mixup_alpha: float = 1.0
    """The share of an example in its mix is drawn from Beta(a, a) with this a, and then the larger part."""
    consistency: float = 0.1
    """Weight of the consistency at the end of the phase; it rises linearly from 0."""


class MixedLayers(Distillation):
    """The terms on a batch mixed with its reverse, and the student's consistency with its own unmixed states.

    Args:
        student, teacher, terms: as for `Distillation`.
        mixup: draws the shares.
        own: the terms that compare the student with itself.
        weight: of the consistency at the end.
        memory: holds the share of the phase that is done.
    """

    def __init__(
        self,
        student: TaskModel,
        teacher: TaskModel,
        terms: Sequence[Term],
        mixup: Mixup,
        own: Sequence[Term],
        weight: float,
        memory: Tensor,
    ) -> None:
        super().__init__(student, teacher, terms)
        self.mixup, self.own, self.weight, self.memory = mixup, own, weight, memory
        self.own_needs = Needs()
        for term in own:
            self.own_needs |= term.needs()[0]
        self.student_needs |= self.own_needs

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        share = self.mixup.draw()
        mixed = both_masks(batch)
        teacher = self.teach(mixed, mixed_embeddings(self.teacher.base, share))
        # The pass with gradients comes first: autocast keeps what it casts without gradients, and would use it again.
        student = self.run(self.student, mixed, self.student_needs, mixed_embeddings(self.student.base, share))
        loss = self.total(student, teacher)
        if self.weight:
            with torch.no_grad():
                plain = self.run(self.student, batch, self.own_needs)
            difference = self.weight * float(self.memory[_RAMP]) * self.inconsistency(student, plain, share)
            self.parts["consistency"] = difference.detach()
            loss = loss + difference
        return {"loss": loss}

    def inconsistency(self, mixed: Outputs, plain: Outputs, share: float) -> Tensor:
        """How far the mix is from its two parts, weighted by their shares; the gradient flows to the mix alone."""
        losses: list[Tensor] = []
        with torch.autocast(device_type=mixed_device(mixed), enabled=False):
            for weight, part in ((share, plain), (1.0 - share, _reversed(plain))):
                mine = Outputs(mixed.states, token_mask=part.token_mask)
                losses += [weight * term.weight * term.loss(mine, part) for term in self.own]
        return torch.stack(losses).sum()


def mixed_device(outputs: Outputs) -> str:
    """The kind of device that states lie on."""
    states = outputs.states
    return next(iter([*states.hidden.values(), *states.query.values(), *states.value.values()])).device.type


def _reversed(outputs: Outputs) -> Outputs:
    """The batch in the order of its partners."""
    states, mask = outputs.states, outputs.token_mask
    kinds = (states.hidden, states.query, states.key, states.value)
    flipped = States(*({layer: state.flip(0) for layer, state in kind.items()} for kind in kinds))
    return Outputs(flipped, token_mask=None if mask is None else mask.flip(0))


class _Layers(LayersPhase):
    layered: ConsistentLayers

    def start(self) -> None:
        super().start()
        self.module.memory.zero_()

    def make(self, terms: Sequence[Term]) -> Distillation:
        method, settings = self.layered, self.method.settings
        if not settings.mixup:
            return super().make(terms)
        memory, own = self.module.memory, method.own_terms()
        mixup = Mixup(method.context.seed, memory, _DRAWN, settings.mixup_alpha)
        return MixedLayers(
            self.module.model, method.teacher, terms, mixup, own, weight=settings.consistency, memory=memory
        )

    def after_step(self, step: int, total: int) -> bool:
        self.module.memory[_RAMP] = step / total
        return super().after_step(step, total)


class ConsistentLayers(LayersFirst):
    """Distils the last layer on mixed batches with consistency, then the logits."""

    name = "cr_ild"
    summary = "CR-ILD: the last layer's maps and states on mixed batches with consistency, then the teacher's logits"
    Settings = Settings
    defaults = {  # noqa: RUF012 (a Mapping in the base)
        **LAYERS_FIRST_DEFAULTS,
        "per_device_train_batch_size": 16,
        "num_train_epochs": 4.0,
        "teacher_learning_rate": 2e-5,
        "teacher_epochs": 4.0,
    }

    def check(self) -> None:
        super().check()
        settings = self.settings
        words = self.objective()
        for word in words:
            if word not in OBJECTIVES:
                raise unknown("objective", word, OBJECTIVES)
        if len(set(words)) < len(words):
            raise UserError(f"objective {settings.objective}: expected each word once")
        if settings.layers not in _LAYERS:
            raise unknown("layers", settings.layers, _LAYERS)
        if "attention" in words:
            self.check_heads("use --objective relations+hidden or relations, which need no equal heads")
        if "hidden" in words:
            self.check_width()
        if "relations" in words:
            check_relation_heads(self, settings.relation_heads)
        self.pairs()
        alpha, weight = settings.mixup_alpha, settings.consistency
        check_setting("mixup_alpha", alpha, 0.0 < alpha < math.inf, "a positive number")
        fits = 0.0 <= weight < math.inf and (settings.mixup or weight == 0.0)
        check_setting("consistency", weight, fits, "a weight of 0 or more, and 0 with --no-mixup")

    def objective(self) -> list[str]:
        """The words of the setting."""
        return [word.strip() for word in self.settings.objective.split("+")]

    def pairs(self) -> LayerMap:
        """The layers that are compared."""
        return (uniform_map if self.settings.layers == "uniform" else last_layer)(*self.layers())

    def compares_hidden(self) -> bool:
        return "hidden" in self.objective()

    def layer_terms(self) -> Sequence[Term]:
        words, pairs = self.objective(), self.pairs()
        terms: list[Term] = [AttentionKL(pairs)] if "attention" in words else []
        if "hidden" in words:
            # The uniform map has the embedding outputs too.
            whole = self.settings.layers == "uniform"
            states = uniform_map(*self.layers(), embeddings=True) if whole else pairs
            terms.append(Hidden(states, project=self.project))
        if "relations" in words:
            terms.append(Relations(pairs, check_relation_heads(self, self.settings.relation_heads)))
        return terms

    def own_terms(self) -> Sequence[Term]:
        """What of the student's last layer must agree with itself: all that is compared with the teacher."""
        words, last = self.objective(), self.layers()[0]
        pairs = last_layer(last, last)
        terms: list[Term] = [AttentionKL(pairs)] if "attention" in words else []
        terms += [Hidden(pairs)] if "hidden" in words else []
        heads = self.settings.relation_heads
        return [*terms, Relations(pairs, check_relation_heads(self, heads))] if "relations" in words else terms

    def first_phase(self) -> Phase:
        return _Layers(self)
