"""Layer by layer: every distinct linear in every format against the best dense path, and where the two break even."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsebert.errors import UserError
from sparsebert.nn import SparseLinear
from sparsebert.nn.structure import structure_of
from sparsebert.ops.dense_linear import dense_linear
from sparsebert.patterns import Matrix, Pattern, parse_pattern
from sparsebert.reports.subject import select_masks
from sparsebert.reports.timing import Stopwatch, Timing, interleave
from sparsebert.reports.variants import PRECISIONS, has_onednn

__all__ = ["SPARSITIES", "Clock", "break_even", "crossing", "format_of", "layer_rows", "random_scores"]

SPARSITIES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Those of the random masks between which the break-even is looked for."""

# Layers whose sparsities differ by less are taken as one: they run equally fast.
_STEP = 0.05
# A candidate that would leave out less of the weight is no candidate.
_LEAST_GONE = 0.05

Call = Callable[[], object]


@dataclass(frozen=True)
class Clock:
    """How layers are timed."""

    repeats: int
    stopwatch: Stopwatch
    seconds: float
    """After which no further round of one comparison is begun."""

    def __call__(self, calls: Mapping[str, Call]) -> dict[str, Timing]:
        return interleave(calls, self.repeats, self.stopwatch, budget=self.seconds)


def layer_rows(
    linears: Mapping[str, nn.Linear],
    rows: Sequence[int],
    precisions: Sequence[str],
    formats: Sequence[str] | None,
    clock: Clock,
) -> list[dict[str, Any]]:
    """Every distinct shape and sparsity, at every number of rows.

    Args:
        linears: the masked linears by name, in fp32.
        rows: real tokens of the batches.
        precisions: keys of `PRECISIONS`.
        formats: spellings to time; None takes all that fit the layer.
        clock: times them.

    Returns:
        For each: `shape` `[N, K]`, `sparsity`, `layers` (their names; the first was timed), `rows`, `ms` (medians by
        candidate), `best_dense`, `best` (of the formats; None where none fits) and `speedup` of the one over the other.
    """
    groups: dict[tuple[int, int, int], list[str]] = {}
    for name, linear in linears.items():
        gone = 1 - int(linear.weight.count_nonzero()) / linear.weight.numel()
        groups.setdefault((*linear.weight.shape, round(gone / _STEP)), []).append(name)
    found = []
    for names in groups.values():
        linear = linears[names[0]]
        sparse = _sparse_layers(linear, precisions, formats)
        gone = 1 - int(linear.weight.count_nonzero()) / linear.weight.numel()
        for count in rows:
            dense = _dense_calls(linear, count, precisions)
            ms = _medians(clock({**dense, **_sparse_calls(sparse, count)}))
            best_dense = min(dense, key=lambda name: ms[name])
            best = min(sparse, key=lambda name: ms[name], default=None)
            found.append(
                {
                    "shape": list(linear.weight.shape),
                    "sparsity": round(gone, 4),
                    "layers": names,
                    "rows": count,
                    "ms": ms,
                    "best_dense": best_dense,
                    "best": best,
                    "speedup": None if best is None else round(ms[best_dense] / ms[best], 3),
                }
            )
    return found


def break_even(
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    pattern: str,
    precisions: Sequence[str],
    clock: Clock,
    device: torch.device,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """From which sparsity on a pattern beats the best dense path: by random masks of that pattern on random weights.

    Returns:
        For each shape, number of rows and precision: `shape`, `rows`, `format` (with its precision), `ms` by sparsity,
        `best_dense`, its `dense_ms`, and `break_even` (see `crossing`). Nothing for n:m, whose sparsity is fixed, nor
        for a shape that the pattern does not divide.
    """
    found: list[dict[str, Any]] = []
    spelling = format_of(pattern)
    if spelling.startswith("semi_structured"):
        return found
    for shape in shapes:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / math.sqrt(shape[1])
        linear = nn.Linear(shape[1], shape[0], device=device).requires_grad_(False)
        linear.weight.copy_(weight)
        try:
            masks = {share: _random_mask(pattern, shape, share, seed).to(device) for share in SPARSITIES}
        except UserError:
            continue
        for precision in precisions:
            layers = {
                str(share): SparseLinear.from_linear(linear, mask, format=spelling, dtype=PRECISIONS[precision])
                for share, mask in masks.items()
            }
            for count in rows:
                dense = _dense_calls(linear, count, precisions)
                ms = _medians(clock({**dense, **_sparse_calls(layers, count)}))
                best = min(dense, key=lambda name: ms[name])
                found.append(
                    {
                        "shape": list(shape),
                        "rows": count,
                        "format": f"{spelling} {precision}",
                        "ms": {str(share): ms[str(share)] for share in SPARSITIES},
                        "best_dense": best,
                        "dense_ms": ms[best],
                        "break_even": crossing({share: ms[str(share)] for share in SPARSITIES}, ms[best]),
                    }
                )
    return found


def crossing(times: Mapping[float, float], dense: float) -> float | None:
    """From which sparsity on `times`, by sparsity, are no longer than `dense`; interpolated between two of them.

    0.0 where already the least sparsity is faster, None where the greatest is not.
    """
    before: float | None = None
    for share in sorted(times, reverse=True):
        if times[share] > dense:
            if before is None:
                return None
            slope = (times[share] - dense) / (times[share] - times[before])
            return round(share + slope * (before - share), 3)
        before = share
    return 0.0


def format_of(pattern: str) -> str:
    """The format that a pattern is stored in."""
    if pattern.startswith("block:"):
        return pattern.replace("block:", "blocks:")
    if ":" in pattern:
        return f"semi_structured:{pattern}"
    return "unstructured" if pattern == "unstructured" else "compact"


def random_scores(pattern: Pattern, matrices: Sequence[Matrix], seed: int) -> list[Tensor]:
    """Scores for `select_masks` that make a random mask."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(group.shape, generator=generator) for group in pattern.groups(matrices)]


def _random_mask(pattern: str, shape: tuple[int, int], sparsity: float, seed: int) -> Tensor:
    # A single matrix has no structure beside it: a neuron, or a head, is so many of its rows.
    chosen = parse_pattern(f"block:1x{shape[1]}" if format_of(pattern) == "compact" else pattern)
    matrices = [Matrix("layer", shape, "ffn_in")]
    return select_masks(chosen, matrices, sparsity, random_scores(chosen, matrices, seed))["layer"]


def _sparse_layers(
    linear: nn.Linear, precisions: Sequence[str], formats: Sequence[str] | None
) -> dict[str, SparseLinear]:
    """The layer in every format that can hold it, by format and precision."""
    layers = {}
    structure = structure_of(linear.weight)
    for precision in precisions:
        candidates, _ = structure.candidates(PRECISIONS[precision], trainable=False)
        for spelling, stored in candidates.items():
            wanted = formats is None or spelling in formats or formats == ["auto"]
            if wanted and stored <= (1 - _LEAST_GONE) * structure.size:
                layers[f"{spelling} {precision}"] = SparseLinear.from_linear(
                    linear, format=spelling, dtype=PRECISIONS[precision]
                )
    return layers


def _dense_calls(linear: nn.Linear, rows: int, precisions: Sequence[str]) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    for precision in precisions:
        dtype = PRECISIONS[precision]
        x = _inputs(linear.weight, rows, dtype)
        weight, bias = linear.weight.to(dtype), None if linear.bias is None else linear.bias.to(dtype)
        calls[f"torch {precision}"] = functools.partial(F.linear, x, weight, bias)
        if precision == "fp32" and has_onednn(weight.device):
            calls["oneDNN fp32"] = functools.partial(dense_linear, x, weight, bias)
    return calls


def _sparse_calls(layers: Mapping[str, SparseLinear], rows: int) -> dict[str, Call]:
    return {
        name: functools.partial(layer, _inputs(layer.values, rows, layer.values.dtype, layer.in_features))
        for name, layer in layers.items()
    }


def _inputs(like: Tensor, rows: int, dtype: torch.dtype, width: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, width or like.shape[1], generator=generator).to(like.device, dtype)


def _medians(timings: Mapping[str, Timing]) -> dict[str, float]:
    """Milliseconds by candidate."""
    return {name: round(timing.median * 1e3, 5) for name, timing in timings.items()}
