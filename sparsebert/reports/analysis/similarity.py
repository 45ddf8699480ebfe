"""How alike masks are: |a and b| / |a or b| (Jaccard), mean over matrices (TAMT, its analysis of mask similarity)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sparsebert.errors import UserError
from sparsebert.reports.analysis.base import Analysis, Finding, Options, needs_masks
from sparsebert.reports.analysis.rank import magnitude_masks, pretrained_weights
from sparsebert.reports.runs import RunRecord
from sparsebert.reports.speed_table import Table

__all__ = ["SIMILARITY", "expected_jaccard", "jaccard"]

_MAGNITUDE = "one-shot magnitude"


def jaccard(one: Tensor, other: Tensor) -> float:
    """|one and other| / |one or other| of two bool masks of one shape; 1.0 where both keep nothing."""
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 1.0


def expected_jaccard(one: float, other: float) -> float:
    """What two independent random masks come to that keep these shares of a large matrix: pq / (p + q - pq)."""
    union = one + other - one * other
    return one * other / union if union else 1.0


def _similarity(runs: Sequence[RunRecord], options: Options) -> Finding:
    _check_same_base(runs)
    pairs = [
        {"runs": [one.label, other.label], **_compare(one.masks(), other.masks())}
        for one, other in itertools.combinations(runs, 2)
    ]
    notes = []
    weights: dict[str, Tensor] | None = None
    for run in runs:
        options.say(f"similarity: {run.label} and {_MAGNITUDE}")
        try:
            weights = pretrained_weights(run) if weights is None else weights
            chosen = magnitude_masks(run, weights)
        except UserError as error:
            notes.append(f"{run.label} is not compared with {_MAGNITUDE}: {error}")
            continue
        pairs.append({"runs": [run.label, _MAGNITUDE], **_compare(run.masks(), chosen)})
    if not pairs:
        raise UserError(f"there is nothing to compare {runs[0].label} with; {'; '.join(notes)}")
    rows = [
        (f"{pair['runs'][0]} | {pair['runs'][1]}", f"{pair['jaccard']:.4f}", f"{pair['expected']:.4f}")
        for pair in pairs
    ]
    notes += [f"{_MAGNITUDE}: of the pre-trained weights, as many kept in every matrix as the run keeps"]
    heads = ("masks", "Jaccard", "if independent")
    table = Table("similarity of masks, mean over matrices", heads, rows, tuple(notes))
    return Finding({"pairs": pairs, "notes": notes}, [table])


def _check_same_base(runs: Sequence[RunRecord]) -> None:
    first = runs[0]
    for run in runs[1:]:
        if run.base != first.base:
            raise UserError(f"{run.label} began with another pre-trained model than {first.label}")
        masks, others = run.masks(), first.masks()
        if masks.keys() != others.keys() or any(mask.shape != others[name].shape for name, mask in masks.items()):
            raise UserError(f"{run.label} masks other matrices than {first.label}")


def _compare(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Any]:
    by_matrix = {name: jaccard(mask, other[name]) for name, mask in one.items()}
    expected = [expected_jaccard(_kept(mask), _kept(other[name])) for name, mask in one.items()]
    return {
        "jaccard": sum(by_matrix.values()) / len(by_matrix),
        "expected": sum(expected) / len(expected),
        "by_matrix": by_matrix,
    }


def _kept(mask: Tensor) -> float:
    return int(mask.sum()) / mask.numel()


SIMILARITY = Analysis("how alike masks are: each other's, magnitude's, chance's", _similarity, needs_masks)
