"""Scores to masks over many tensors at once: exactly the k smallest pruned, or all above a threshold kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsebert.ops._backend import Op
from sparsebert.ops.bits import bytes_for, check_grid, pack_bits
from sparsebert.ops.masked_weight import COMPUTE_DTYPES, bump_versions, check_out, masked_weight_reference

__all__ = ["select_mask", "select_mask_reference", "threshold_mask", "threshold_mask_reference"]


def select_mask(
    scores: Sequence[Tensor],
    num_pruned: int,
    weights: Sequence[Tensor] | None = None,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Prune exactly the `num_pruned` smallest of all scores together.

    The score tensors count as one sequence, in list order and row-major within a tensor. Of equal scores the earliest
    are pruned first; -0.0 equals 0.0. The result does not depend on the number of threads.

    On a GPU nothing waits for the result where `out` is given and is not `weights`, as in a training's steps. A NaN
    among the scores is no error there: it leaves NaN in all of `out` and no bit set, so that the next loss tells. In a
    captured CUDA graph it is none either; bits are all 0, and an `out` that is `weights` stays as it was.

    Args:
        scores: float32 tensors of any shape on one device (float16, bfloat16 and float64 are taken too, exactly).
        num_pruned: how many entries get 0, in `[0, total]`.
        weights: one `[N, K]` matrix per score tensor, which must then be a grid `[GN, GK]` on it; with `out` the same
            pass writes `where(kept, weight, 0)`.
        out: like `weights` in shape, float32, bfloat16 or float16, contiguous; written in place.

    Returns:
        One uint8 `[ceil(numel / 8)]` of bits per score tensor, 1 = kept (see `sparsebert.ops.bits`).

    Raises:
        ValueError: a NaN among the scores (naming the tensor), `num_pruned` out of range, or arguments that do not fit.
    """
    scores, weights, out = _check(scores, weights, out)
    total = sum(score.numel() for score in scores)
    if not 0 <= num_pruned <= total:
        raise ValueError(f"num_pruned: expected 0 to {total} (all scores), got {num_pruned}")
    return _run(_select, scores, int(num_pruned), weights, out)


def threshold_mask(
    scores: Sequence[Tensor],
    threshold: float,
    weights: Sequence[Tensor] | None = None,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Keep the entries with score > `threshold`; arguments, result and errors as in `select_mask`.

    The comparison is exact: `threshold` is a double and is not rounded to the scores' dtype.
    """
    scores, weights, out = _check(scores, weights, out)
    if threshold != threshold:
        raise ValueError("threshold: expected a number, got NaN")
    return _run(_threshold, scores, float(threshold), weights, out)


def select_mask_reference(
    scores: Sequence[Tensor],
    num_pruned: int,
    weights: Sequence[Tensor],
    bits: Sequence[Tensor],
    out: Sequence[Tensor],
) -> None:
    """The definition: a stable sort of the concatenation, whose first `num_pruned` places are pruned."""
    _check_nan(scores)
    # Adding 0.0 makes -0.0 a 0.0, which a radix sort would tell apart.
    flat = torch.cat([score.reshape(-1) for score in scores]) + 0.0
    kept = torch.ones_like(flat, dtype=torch.bool)
    kept[torch.sort(flat, stable=True).indices[:num_pruned]] = False
    _write(list(kept.split([score.numel() for score in scores])), scores, weights, bits, out)


def threshold_mask_reference(
    scores: Sequence[Tensor],
    threshold: float,
    weights: Sequence[Tensor],
    bits: Sequence[Tensor],
    out: Sequence[Tensor],
) -> None:
    """The definition: compare in float64, pack."""
    _check_nan(scores)
    _write([score.double() > threshold for score in scores], scores, weights, bits, out)


def _write(
    kept: Sequence[Tensor],
    scores: Sequence[Tensor],
    weights: Sequence[Tensor],
    bits: Sequence[Tensor],
    out: Sequence[Tensor],
) -> None:
    for mask, target in zip(kept, bits, strict=True):
        target.copy_(pack_bits(mask))
    for i, (weight, target) in enumerate(zip(weights, out, strict=True)):
        masked_weight_reference(weight, bits[i], scores[i].shape, target)


def _check_nan(scores: Sequence[Tensor]) -> None:
    for i, score in enumerate(scores):
        if bool(torch.isnan(score).any()):
            raise ValueError(f"scores[{i}]: has a NaN, which has no rank; check the training for divergence")


def _check(
    scores: Sequence[Tensor], weights: Sequence[Tensor] | None, out: Sequence[Tensor] | None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    scores = list(scores)
    for i, score in enumerate(scores):
        if not score.is_floating_point():
            raise TypeError(f"scores[{i}]: expected a float tensor, got {score.dtype}")
        if score.device != scores[0].device:
            raise ValueError(f"scores[{i}]: expected on {scores[0].device} like scores[0], got {score.device}")
    if (weights is None) != (out is None):
        raise ValueError("weights and out: give both (to write where(kept, weight, 0)) or neither")
    if weights is None or out is None:
        return scores, [], []
    weights, out = list(weights), list(out)
    if not len(scores) == len(weights) == len(out):
        raise ValueError(f"weights and out: expected {len(scores)} like scores, got {len(weights)} and {len(out)}")
    for i, (score, weight, target) in enumerate(zip(scores, weights, out, strict=True)):
        check_grid(weight.shape, score.shape, f"scores[{i}]")
        check_out(f"out[{i}]", target, weight)
        if weight.device != score.device:
            raise ValueError(f"weights[{i}]: expected on {score.device} like scores[{i}], got {weight.device}")
    return scores, weights, out


def _run(op: Op, scores: list[Tensor], limit: Any, weights: list[Tensor], out: list[Tensor]) -> list[Tensor]:
    if not scores:
        return []
    supported = all(score.dtype in COMPUTE_DTYPES for score in scores)
    supported = supported and all(t.dtype in COMPUTE_DTYPES for t in (*weights, *out))
    body = op.pick(scores[0].device, supported)
    bits = [score.new_empty(bytes_for(score.numel()), dtype=torch.uint8) for score in scores]
    with torch.no_grad():
        if supported:
            scores = [score.float().contiguous() for score in scores]
            weights = [weight.contiguous() for weight in weights]
        named_nan(body, scores, limit, weights, bits, out)
    bump_versions(out)
    return bits


def named_nan(body: Callable[..., Any], *args: Any) -> Any:
    """Call a compiled body; its refusal of a NaN arrives as a RuntimeError and leaves as the ValueError it is."""
    if torch.compiler.is_compiling():
        return body(*args)
    try:
        return body(*args)
    except RuntimeError as error:
        found = re.search(r"scores(\[\d+\])?: has a NaN", str(error))
        if found is None:
            raise
        where = found.group(0)
        raise ValueError(f"{where}, which has no rank; check the training for divergence") from None


_select = Op(
    "select_mask", select_mask_reference, lambda scores, num_pruned, weights, bits, out: None, mutates=("bits", "out")
)
_threshold = Op(
    "threshold_mask",
    threshold_mask_reference,
    lambda scores, threshold, weights, bits, out: None,
    mutates=("bits", "out"),
)
