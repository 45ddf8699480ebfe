"""What a subnetwork's mask and weights are worth: the mask shuffled, the weights rescaled or drawn anew.

As in Adapting by Pruning, its table 3: the base is changed and frozen, and a new head is trained on it. A head trained
in the same few steps on the subnetwork as it is stands beside, so that what is lost is due to the change alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsebert.data import TASKS
from sparsebert.errors import UserError
from sparsebert.reports.analysis.base import Analysis, Finding, Options, mean_and_spread, needs_masks, spread_text
from sparsebert.reports.analysis.features import features_of, score_head, train_head
from sparsebert.reports.analysis.opened import OpenRun, open_run
from sparsebert.reports.analysis.rank import pretrained_weights, random_masks
from sparsebert.reports.runs import RunRecord
from sparsebert.reports.speed_table import Table

__all__ = ["REINIT", "SCALES", "SHUFFLE"]

SCALES = (0.01, 0.1)
"""Standard deviations of the factors that weights are rescaled by."""

_AS_IT_IS = "as it is"

Change = Callable[[int], dict[str, Tensor]]
"""Takes a seed; gives new weights of masked matrices by module name, pruned ones zero."""


def _unfit(run: RunRecord, options: Options) -> str | None:
    if reason := needs_masks(run, options):
        return reason
    spec = TASKS.get(str(run.result["task"]))
    return "its task asks for spans, and its head sees every token" if spec and spec.kind == "span" else None


def _shuffle(runs: Sequence[RunRecord], options: Options) -> Finding:
    def changes(opened: OpenRun) -> dict[str, Change]:
        run = opened.record
        before = {name: weight.to(opened.device) for name, weight in pretrained_weights(run).items()}
        for name, weight in opened.weights().items():
            kept = opened.masks[name].to(opened.device)
            if not torch.equal(weight[kept], before[f"{name}.weight"][kept]):
                raise UserError(
                    f"{run.label}: its weights were trained, for the places that its mask keeps: there are none for "
                    "others (give a run of adapt_prune or smp, or one with --weights pretrained)"
                )

        def shuffled(seed: int) -> dict[str, Tensor]:
            masks = {name: mask.to(opened.device) for name, mask in random_masks(run, seed).items()}
            return {name: torch.where(mask, before[f"{name}.weight"], 0.0) for name, mask in masks.items()}

        return {"shuffled within the layer": shuffled}

    return _measure(runs, options, "mask shuffled within each matrix", changes)


def _reinit(runs: Sequence[RunRecord], options: Options) -> Finding:
    def changes(opened: OpenRun) -> dict[str, Change]:
        own = opened.weights()

        def rescaled(spread: float) -> Change:
            def change(seed: int) -> dict[str, Tensor]:
                noise = _noise(own, seed)
                return {name: weight * (1.0 + spread * noise[name]) for name, weight in own.items()}

            return change

        def drawn(seed: int) -> dict[str, Tensor]:
            found = _noise(own, seed)
            for name, weight in own.items():
                kept = opened.masks[name].to(weight.device)
                # Of the size that the kept weights have: what changes is which weight is where.
                size = weight[kept].square().mean().sqrt() if bool(kept.any()) else weight.new_zeros(())
                found[name] = torch.where(kept, found[name] * size, 0.0)
            return found

        return {**{f"rescaled by N(1, {spread:g})": rescaled(spread) for spread in SCALES}, "drawn anew": drawn}

    return _measure(runs, options, "weights of the masked matrices re-initialised", changes)


def _noise(weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """N(0, 1) of the weights' shapes, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(weight.shape, generator=generator).to(weight) for name, weight in weights.items()}


def _measure(
    runs: Sequence[RunRecord], options: Options, title: str, changes: Callable[[OpenRun], dict[str, Change]]
) -> Finding:
    found: dict[str, Any] = {}
    rows = []
    for run in runs:
        opened = open_run(run, options, need_train=True)
        made = changes(opened)
        options.say(f"{title}: {run.label}, as it is")
        saved = score_head(opened, opened.model.head, features_of(opened, opened.validation()))
        scores = {_AS_IT_IS: _scores(opened, options.seeds)}
        for name, change in made.items():
            scores[name] = []
            for seed in options.seeds:
                options.say(f"{title}: {run.label}, {name}, seed {seed}")
                opened.put(change(seed))
                scores[name] += _scores(opened, (seed,))
        found[run.label] = {
            "metric": opened.spec.metric,
            "head_steps": options.head_steps,
            "seeds": list(options.seeds),
            "saved": saved,
            "variants": {name: _summary(values) for name, values in scores.items()},
        }
        rows.append((run.label, opened.spec.metric, "with the head of the run", f"{saved:.4f}", ""))
        before = mean_and_spread(scores[_AS_IT_IS])[0]
        for name, values in scores.items():
            lost = "" if name == _AS_IT_IS else f"{mean_and_spread(values)[0] - before:+.4f}"
            rows.append(("", "", name, spread_text(values), lost))
    note = (
        f"new heads of {options.head_steps} steps, seeds {', '.join(map(str, options.seeds))}, on at most "
        f"{options.max_samples:,} rows of train; scored on as many of validation"
    )
    table = Table(title, ("run", "metric", "subnetwork", "score", "change"), rows, (note,))
    return Finding({"runs": found}, [table])


def _scores(opened: OpenRun, seeds: Sequence[int]) -> list[float]:
    """Of the base as it is now, with a new head for each seed."""
    known, asked = features_of(opened, opened.train()), features_of(opened, opened.validation())
    heads = [train_head(opened.model, known, opened.options.head_steps, seed) for seed in seeds]
    return [score_head(opened, head, asked) for head in heads]


def _summary(values: Sequence[float]) -> dict[str, Any]:
    mean, spread = mean_and_spread(values)
    return {"mean": mean, "std": spread, "scores": list(values)}


SHUFFLE = Analysis("score with the mask shuffled within each matrix, a new head trained", _shuffle, _unfit, trains=True)
REINIT = Analysis("score with weights rescaled or drawn anew, a new head trained", _reinit, _unfit, trains=True)
