"""Gradual magnitude pruning (Zhu and Gupta, 2018, arXiv 1710.01878)."""

from __future__ import annotations

from dataclasses import dataclass

from sparsebert.errors import UserError
from sparsebert.methods import one_shot
from sparsebert.methods.base import Context, Phase
from sparsebert.methods.one_shot import Resettable, ResetPhase
from sparsebert.methods.phases import WeightsPhase

__all__ = ["GradualMagnitude", "cubic_sparsity"]


def cubic_sparsity(progress: float, final: float, initial: float = 0.0) -> float:
    """Sparsity at `progress` in [0, 1] of the schedule: `final + (initial - final) (1 - progress)^3`."""
    return final + (initial - final) * (1.0 - min(max(progress, 0.0), 1.0)) ** 3


@dataclass(frozen=True)
class Settings(one_shot.Settings):
    """Settings of gradual pruning."""

    initial_sparsity: float = 0.0
    """Sparsity at the first pruning."""
    prune_from: float = 0.0
    """Share of the steps before the first pruning."""
    prune_until: float = 0.7
    """Share of the steps at which the target is reached; the rest trains what is left."""
    prunings: int = 100
    """How many times the mask is chosen anew on the way."""


class _Gradual(WeightsPhase):
    """Trains all weights while the smallest go, a few at a time."""

    def after_step(self, step: int, total: int) -> bool:
        settings, context, masks = self.method.settings, self.method.context, self.method.masks
        first = int(settings.prune_from * total)
        last = max(first + 1, int(settings.prune_until * total))
        every = max(1, (last - first) // settings.prunings)
        if first <= step <= last and ((step - first) % every == 0 or step == last):
            progress = (step - first) / (last - first)
            sparsity = cubic_sparsity(progress, context.sparsity, settings.initial_sparsity)
            masks.select(masks.pattern.magnitude(masks.groups, masks.weights()), sparsity, context.allocation)
        return super().after_step(step, total)

    def logs(self) -> dict[str, float]:
        return {"sparsity": self.method.masks.sparsity()}

    def finish(self) -> None:
        # A phase cut short, by --max-steps 1 say, still ends at the target.
        masks, context = self.method.masks, self.method.context
        masks.select(masks.pattern.magnitude(masks.groups, masks.weights()), context.sparsity, context.allocation)
        masks.zero_pruned()


class GradualMagnitude(Resettable):
    """Cubic schedule; what was pruned is zero from then on and does not come back."""

    name = "gmp"
    summary = "gradual magnitude pruning on a cubic schedule, while all weights train"
    Settings = Settings

    def __init__(self, context: Context, settings: Settings) -> None:
        if not 0.0 <= settings.prune_from < settings.prune_until <= 1.0:
            raise UserError(
                f"prune_from {settings.prune_from:g}, prune_until {settings.prune_until:g}: expected shares of the "
                "steps with 0 <= prune_from < prune_until <= 1"
            )
        if not 0.0 <= settings.initial_sparsity <= context.sparsity:
            raise UserError(
                f"initial_sparsity {settings.initial_sparsity:g}: expected at least 0 and at most the target "
                f"{context.sparsity:g}"
            )
        if settings.prunings < 1:
            raise UserError(f"prunings {settings.prunings}: expected at least 1")
        super().__init__(context, settings)

    def phases(self) -> list[Phase]:
        phases = [*self.untouched_phases(), _Gradual(self, "prune")]
        if self.settings.weights == "pretrained":
            phases.append(ResetPhase(self))
        return phases
