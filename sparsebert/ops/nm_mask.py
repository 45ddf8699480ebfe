"""n:m masks: in every group of m consecutive scores of a row the n largest are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsebert.ops._backend import Op
from sparsebert.ops.bits import bytes_for, pack_bits
from sparsebert.ops.masked_weight import COMPUTE_DTYPES
from sparsebert.ops.select_mask import named_nan

__all__ = ["nm_mask", "nm_mask_reference"]

MAX_M = 32


def nm_mask(scores: Tensor, n: int, m: int, threshold: float | None = None) -> Tensor:
    """Keep the `n` largest of every `m` consecutive scores, and with `threshold` all above it too.

    Of equal scores the earliest is pruned first; -0.0 equals 0.0. In a captured CUDA graph a NaN is no error: it
    leaves no bit set.

    Args:
        scores: `[N, K]`, `m` divides `K`; any float dtype (the compiled kernel works on float32).
        n, m: `0 <= n <= m`, `1 <= m <= 32`.
        threshold: keep entries above it whatever their rank; compared exactly, as a double.

    Returns:
        uint8 `[ceil(N * K / 8)]` of bits, 1 = kept (see `sparsebert.ops.bits`).

    Raises:
        ValueError: `n`, `m` or the shape do not fit, or a NaN among the scores.
        TypeError: `scores` is not a float tensor.
    """
    if not scores.is_floating_point():
        raise TypeError(f"scores: expected a float tensor, got {scores.dtype}")
    if not (1 <= m <= MAX_M and 0 <= n <= m):
        raise ValueError(f"n, m: expected 0 <= n <= m and 1 <= m <= {MAX_M}, got {n}:{m}")
    if scores.dim() != 2 or scores.shape[1] % m:
        raise ValueError(f"scores: expected [N, K] with K a multiple of {m}, got {list(scores.shape)}")
    if threshold is not None and threshold != threshold:
        raise ValueError("threshold: expected a number or None, got NaN")
    supported = scores.dtype in COMPUTE_DTYPES
    body = _op.pick(scores.device, supported)
    with torch.no_grad():
        ready = scores.float().contiguous() if supported else scores
        return named_nan(body, ready, n, m, threshold)


def nm_mask_reference(scores: Tensor, n: int, m: int, threshold: float | None) -> Tensor:
    """The definition: rank each group by a stable sort, keep the last n places."""
    if bool(torch.isnan(scores).any()):
        raise ValueError("scores: has a NaN, which has no rank; check the training for divergence")
    groups = scores.reshape(-1, m) + 0.0
    order = torch.sort(groups, dim=1, stable=True).indices
    kept = torch.zeros_like(groups, dtype=torch.bool)
    kept.scatter_(1, order[:, m - n :], True)
    if threshold is not None:
        kept |= groups.double() > threshold
    return pack_bits(kept)


_op = Op(
    "nm_mask",
    nm_mask_reference,
    lambda scores, n, m, threshold: scores.new_empty(bytes_for(scores.numel()), dtype=torch.uint8),
)
