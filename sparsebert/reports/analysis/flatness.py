"""How flat the minimum is: the loss on training rows at weights moved in random directions.

Directions are normalised filter by filter (Li et al., 2018, arXiv 1712.09913): each row of a weight matrix of a random
direction has the length of that row of the weights, so that models whose weights differ in size can be compared.
Biases and layer norms stay. Pruned weights stay zero: the subnetwork moves within itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsebert.reports.analysis.base import Analysis, Finding, Options, mean_and_spread, spread_text, takes_all
from sparsebert.reports.analysis.opened import Batch, OpenRun, open_run
from sparsebert.reports.runs import RunRecord
from sparsebert.reports.speed_table import Table

__all__ = ["FLATNESS", "RADII", "direction"]

RADII = (0.05, 0.1, 0.2, 0.4)
"""Lengths of the steps, in units of each row's own length."""


def _flatness(runs: Sequence[RunRecord], options: Options) -> Finding:
    found: dict[str, Any] = {}
    rows = []
    for run in runs:
        opened = open_run(run, options, need_train=True)
        batches = [(len(chosen), batch) for chosen, batch in opened.batches(opened.train())]
        options.say(f"flatness: {run.label}, as it is")
        at_rest = _loss(opened, batches)
        losses: dict[float, list[float]] = {radius: [] for radius in RADII}
        for seed in options.seeds:
            options.say(f"flatness: {run.label}, direction {seed}")
            _along(opened, batches, seed, losses)
        found[run.label] = {
            "rows": sum(count for count, _ in batches),
            "seeds": list(options.seeds),
            "loss": at_rest,
            "points": [{"radius": radius, **_summary(values)} for radius, values in losses.items()],
        }
        rows.append((run.label, f"{at_rest:.4f}", *(spread_text(values) for values in losses.values())))
    heads = ("run", "loss", *(f"at {radius:g}" for radius in RADII))
    note = (
        f"mean over {len(options.seeds)} filter-normalised directions, on at most {options.max_samples:,} rows of train"
    )
    return Finding({"runs": found}, [Table("flatness: the loss at a distance", heads, rows, (note,))])


def _summary(values: Sequence[float]) -> dict[str, Any]:
    mean, spread = mean_and_spread(values)
    return {"mean": mean, "std": spread, "losses": list(values)}


def direction(weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A random direction with rows as long as the weights' own, zero where they are; matrices only, the same on every
    device."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in sorted(weights.items()):
        if weight.dim() < 2:
            continue
        drawn = torch.randn(weight.shape, generator=generator).to(weight) * (weight != 0)
        lengths = [tensor.flatten(1).norm(dim=1) for tensor in (weight, drawn)]
        factor = torch.where(lengths[1] > 0, lengths[0] / lengths[1], 0.0)
        found[name] = drawn * factor.view(-1, *[1] * (weight.dim() - 1))
    return found


@torch.no_grad()
def _along(opened: OpenRun, batches: list[tuple[int, Batch]], seed: int, losses: dict[float, list[float]]) -> None:
    """Adds the losses along one direction; the weights are put back to the last bit."""
    parameters = dict(opened.model.named_parameters())
    step = direction(parameters, seed)  # type: ignore[arg-type]
    before = {name: parameters[name].clone() for name in step}
    for radius in RADII:
        for name, move in step.items():
            parameters[name].copy_(before[name] + radius * move)
        losses[radius].append(_loss(opened, batches))
    for name, weight in before.items():
        parameters[name].copy_(weight)


@torch.no_grad()
def _loss(opened: OpenRun, batches: list[tuple[int, Batch]]) -> float:
    """The task's mean loss, without dropout."""
    total = sum(count * float(opened.model(**batch)["loss"]) for count, batch in batches)
    return total / sum(count for count, _ in batches)


FLATNESS = Analysis("loss at weights moved in random directions (filter-normalised)", _flatness, takes_all)
