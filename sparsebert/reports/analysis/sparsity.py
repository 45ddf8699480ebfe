"""Sparsity by layer and component (Adapting by Pruning, its figures of where methods prune)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from sparsebert.patterns.matrix import COMPONENTS, Matrix
from sparsebert.reports.analysis.base import Analysis, Finding, Options, needs_masks
from sparsebert.reports.runs import RunRecord
from sparsebert.reports.speed_table import Table

__all__ = ["SPARSITY"]


def _sparsity(runs: Sequence[RunRecord], options: Options) -> Finding:
    found = {run.label: _of(run.matrices, run.masks()) for run in runs}
    labels = list(found)
    components = [name for name in COMPONENTS if any(name in found[label]["by_component"] for label in labels)]
    layers = sorted({layer for label in labels for layer in found[label]["by_layer"]}, key=int)
    rows = [("all masked", *(_percent(found[label]["masked"]) for label in labels))]
    rows += [(name, *(_percent(found[label]["by_component"].get(name)) for label in labels)) for name in components]
    rows += [
        (f"layer {int(name) + 1}", *(_percent(found[label]["by_layer"].get(name)) for label in labels))
        for name in layers
    ]
    return Finding({"runs": found}, [Table("sparsity of the masked matrices", ("part", *labels), rows)])


def _of(matrices: Mapping[str, Matrix], masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Pruned share of the masked weights: of all, by component, by encoder layer (from 0), and of each matrix."""
    counts = {name: (mask.numel() - int(mask.sum()), mask.numel()) for name, mask in masks.items()}
    by_component: dict[str, list[str]] = {}
    by_layer: dict[str, list[str]] = {}
    for name in masks:
        matrix = matrices[name]
        by_component.setdefault(matrix.component, []).append(name)
        if matrix.layer is not None:
            by_layer.setdefault(str(matrix.layer), []).append(name)

    def share(names: Iterable[str]) -> float:
        pruned, total = (sum(column) for column in zip(*(counts[name] for name in names), strict=True))
        return pruned / total

    return {
        "masked": share(masks),
        "by_component": {component: share(names) for component, names in by_component.items()},
        "by_layer": {layer: share(names) for layer, names in by_layer.items()},
        "by_matrix": {
            name: {"component": matrices[name].component, "layer": matrices[name].layer, "sparsity": share([name])}
            for name in masks
        },
    }


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


SPARSITY = Analysis("sparsity by layer and component", _sparsity, needs_masks)
