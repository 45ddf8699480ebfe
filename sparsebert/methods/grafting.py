"""Phases in which a student's layers are grafted onto its teacher: what `spd` and `theseus` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from sparsebert.errors import unknown
from sparsebert.methods.base import check_setting
from sparsebert.methods.phases import WeightsPhase, freeze
from sparsebert.models.capture import layers_of

__all__ = ["SCHEDULES", "GraftSettings", "GraftedPhase", "check_grafting", "graft_probability"]

SCHEDULES = ("constant", "linear", "mixed")
# Places in the module's memory.
_FORWARDS, _PROBABILITY = 0, 1


@dataclass(frozen=True)
class GraftSettings:
    """Settings of grafting."""

    graft_probability: float = 0.8
    """Probability that a layer is the student's in a forward pass, where grafting begins; else it is the teacher's."""
    graft_schedule: Literal["constant", "linear", "mixed"] = "linear"
    """How it goes on from there: `constant`; `linear`, rising to 1; or `mixed`, constant and then rising."""
    graft_hold: float = 0.33
    """Share of the phase's steps before a `mixed` schedule begins to rise."""
    graft_until: float = 0.67
    """Share of the phase's steps after which the student runs alone, by every schedule."""


def check_grafting(settings: GraftSettings) -> None:
    """Raises a UserError for settings that no schedule has."""
    p, hold, until = settings.graft_probability, settings.graft_hold, settings.graft_until
    check_setting("graft_probability", p, 0.0 < p <= 1.0, "a probability above 0 (1: the student alone)")
    if settings.graft_schedule not in SCHEDULES:
        raise unknown("graft_schedule", settings.graft_schedule, SCHEDULES)
    check_setting("graft_until", until, 0.0 < until <= 1.0, "a share of the steps above 0, at most 1")
    if settings.graft_schedule == "mixed":
        check_setting("graft_hold", hold, 0.0 <= hold < until, f"a share of the steps below graft_until {until:g}")


def graft_probability(settings: GraftSettings, done: float) -> float:
    """Probability that a layer is the student's when a share `done` in [0, 1] of the steps is done."""
    first, until = settings.graft_probability, settings.graft_until
    if done >= until:
        return 1.0
    if settings.graft_schedule == "constant":
        return first
    begin = settings.graft_hold if settings.graft_schedule == "mixed" else 0.0
    return first + (1.0 - first) * max(0.0, (done - begin) / (until - begin))


class GraftedPhase(WeightsPhase):
    """Trains the student's layers, and masked matrices elsewhere, while some of the layers that run are the teacher's.

    Which ones is drawn anew in every forward pass, each layer for itself, from the seed and a count of the passes:
    alike on all ranks, and in a resumed run. If none would be the student's, one is, picked at random: nothing would
    learn from that step.

    Args:
        method: with a teacher and `GraftSettings`.
        name: of the phase.
        rising: whether the probability follows the schedule; else it stays where it begins.
    """

    def __init__(self, method: Any, name: str, *, rising: bool = True) -> None:
        super().__init__(method, name)
        self.rising = rising

    def training(self) -> dict[str, Any]:
        return {"ddp_find_unused_parameters": True}

    def start(self) -> None:
        module = self.module
        freeze(module)
        module.model.set_base_dropout(True)
        for parameter in self.trained():
            parameter.requires_grad_(True)
        module.memory[_PROBABILITY] = self.probability(0, 1)

    def trained(self) -> list[torch.nn.Parameter]:
        """What learns."""
        module = self.module
        parameters = list(layers_of(module.model.base).parameters())
        known = {id(parameter) for parameter in parameters}
        masked = module.masks.weights().values() if module.masks is not None else ()
        return parameters + [weight for weight in masked if id(weight) not in known]  # type: ignore[misc]

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        return [{"params": self.trained(), "lr": learning_rate}]

    def probability(self, step: int, total: int) -> float:
        """Of the forward passes that follow step `step` of `total`."""
        settings: GraftSettings = self.method.settings
        if not self.rising:
            return settings.graft_probability
        # However few the steps, the last one trains the network that is the result.
        return 1.0 if step and step + 1 >= total else graft_probability(settings, step / total)

    def draw(self) -> list[bool]:
        """For each layer, whether it is the student's in this forward pass."""
        memory, layers = self.module.memory, len(layers_of(self.module.model.base))
        forwards, probability = memory[[_FORWARDS, _PROBABILITY]].tolist()
        memory[_FORWARDS] += 1
        if probability >= 1.0:
            return [True] * layers
        seed = self.method.context.seed * 1_000_003 + int(forwards)
        generator = torch.Generator().manual_seed(seed)
        own = (torch.rand(layers, generator=generator, dtype=torch.float64) < probability).tolist()
        if not any(own):
            own[int(torch.randint(layers, (), generator=generator))] = True
        return own

    def after_step(self, step: int, total: int) -> bool:
        self.module.memory[_PROBABILITY] = self.probability(step, total)
        return super().after_step(step, total)

    def logs(self) -> dict[str, float]:
        return {**super().logs(), "graft_probability": float(self.module.memory[_PROBABILITY])}

    def finish(self) -> None:
        super().finish()
        self.module.objective = None
