"""Gradual magnitude pruning (Zhu and Gupta, 2018, arXiv 1710.01878)."""

from __future__ import annotations

from dataclasses import dataclass

from sparsebert.methods import one_shot
from sparsebert.methods.base import Method, Phase, check_setting
from sparsebert.methods.one_shot import ResetPhase, Resettable
from sparsebert.methods.phases import WeightsPhase
from sparsebert.methods.teachable import TaughtPhase

__all__ = ["CubicSettings", "GradualMagnitude", "check_cubic", "check_span", "cubic_sparsity", "prune_gradually"]


def cubic_sparsity(progress: float, final: float, initial: float = 0.0) -> float:
    """Sparsity at `progress` in [0, 1] of the schedule: `final + (initial - final) (1 - progress)^3`."""
    return final + (initial - final) * (1.0 - min(max(progress, 0.0), 1.0)) ** 3


@dataclass(frozen=True)
class CubicSettings:
    """Settings of pruning on the cubic schedule."""

    initial_sparsity: float = 0.0
    """Sparsity at the first pruning."""
    prune_from: float = 0.0
    """Share of the steps before the first pruning."""
    prune_until: float = 0.7
    """Share of the steps at which the target is reached; the rest trains what is left."""
    prunings: int = 100
    """How many times the mask is chosen anew after the first pruning, evenly spread."""


@dataclass(frozen=True)
class Settings(CubicSettings, one_shot.Settings):
    """Settings of gradual pruning."""


def prune_gradually(method: Method, step: int, total: int) -> None:
    """Prunes the smallest weights after step `step` of `total`, if that is due by the method's `CubicSettings`."""
    settings, context, masks = method.settings, method.context, method.masks
    first = max(1, int(settings.prune_from * total))
    last = max(first + 1, int(settings.prune_until * total))
    done, span = step - first, last - first
    # Whole prunings that are due: evenly spread, at most one a step, the last one at `last`.
    due = done * settings.prunings // span > (done - 1) * settings.prunings // span
    if first <= step <= last and (due or step == first):
        sparsity = cubic_sparsity(done / span, context.sparsity, settings.initial_sparsity)
        masks.select(masks.magnitude(), sparsity, context.allocation)


def check_span(start: float, end: float) -> None:
    """Raises a UserError for shares that cannot be the settings `prune_from` and `prune_until`."""
    check_setting("prune_from", start, 0.0 <= start < 1.0, "a share of the steps, at least 0 and below 1")
    check_setting("prune_until", end, start < end <= 1.0, f"a share of the steps above prune_from {start:g}, at most 1")


def check_cubic(settings: CubicSettings, target: float) -> None:
    """Raises a UserError for a schedule that cannot lead to the sparsity `target`."""
    check_span(settings.prune_from, settings.prune_until)
    initial = settings.initial_sparsity
    check_setting("initial_sparsity", initial, 0.0 <= initial <= target, f"0 to the target sparsity {target:g}")
    check_setting("prunings", settings.prunings, settings.prunings >= 1, "at least 1")


class _Gradual(TaughtPhase, WeightsPhase):
    """Trains all weights while the smallest go, a few at a time."""

    def after_step(self, step: int, total: int) -> bool:
        prune_gradually(self.method, step, total)
        return super().after_step(step, total)

    def logs(self) -> dict[str, float]:
        return {**super().logs(), "sparsity": self.method.masks.sparsity()}

    def finish(self) -> None:
        super().finish()
        # A phase cut short, by --max-steps 1 say, still ends at the target.
        masks, context = self.method.masks, self.method.context
        masks.select(masks.magnitude(), context.sparsity, context.allocation)
        masks.zero_pruned()


class GradualMagnitude(Resettable):
    """Cubic schedule; what was pruned is zero from then on and does not come back."""

    name = "gmp"
    summary = "gradual magnitude pruning on a cubic schedule, while all weights train"
    Settings = Settings

    def check(self) -> None:
        super().check()
        check_cubic(self.settings, self.context.sparsity)

    def phases(self) -> list[Phase]:
        phases = [*self.untouched_phases(), _Gradual(self, "prune")]
        if self.settings.weights == "pretrained":
            phases.append(ResetPhase(self))
        return phases
