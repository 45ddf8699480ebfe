"""W·mask: a weight with its pruned blocks set to exact zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsebert.ops._backend import Op
from sparsebert.ops.bits import check_bits, check_grid, expand_grid, unpack_bits

__all__ = ["masked_weight", "masked_weight_reference", "masked_weights", "masked_weights_reference"]

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def masked_weight(
    weight: Tensor,
    bits: Tensor,
    grid: Sequence[int] | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`where(kept, weight, 0)`, cast to another dtype on the way if wanted.

    Selects rather than multiplies: a NaN or infinity in a pruned place gives 0.

    Args:
        weight: `[N, K]`, any float dtype, contiguous.
        bits: uint8 `[ceil(GN * GK / 8)]`, 1 = kept (see `sparsebert.ops.bits`).
        grid: `(GN, GK)`; None means one bit to a weight.
        out: `[N, K]` contiguous, written in place and returned; it may be `weight` itself.
        dtype: of the result; `weight`'s where None. Not together with `out`.

    Returns:
        `[N, K]`, a constant for autograd.

    Raises:
        ValueError: sizes, dtypes or devices that do not fit, named.
    """
    cells = tuple(weight.shape) if grid is None else tuple(grid)
    check_grid(weight.shape, cells)
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    elif dtype is not None and dtype != out.dtype:
        raise ValueError(f"dtype: {dtype} does not fit out, which is {out.dtype}; give one of the two")
    _check(weight, cells, bits, out)
    with torch.no_grad():
        _op.pick(weight.device, _supported(weight, out))(weight, bits, list(cells), out)
    bump_versions([out])
    return out


def masked_weights(weights: Sequence[Tensor], bits: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """`masked_weight` of many matrices, one bit to a weight, in one pass that shares them among the threads.

    On a CPU a result of 32 MB or more in all is written past the caches, which could not keep it.

    Args:
        weights: `[N, K]` each, any float dtype, contiguous, all on one device.
        bits: for each uint8 `[ceil(N * K / 8)]`, 1 = kept.
        out: for each `[N, K]` contiguous, written in place; it may be the weight itself.

    Raises:
        ValueError: sizes, dtypes or devices that do not fit, named.
    """
    if not len(weights) == len(bits) == len(out):
        raise ValueError(f"bits, out: expected {len(weights)}, one for each weight, got {len(bits)} and {len(out)}")
    for place, (weight, packed, result) in enumerate(zip(weights, bits, out, strict=True)):
        if weight.dim() != 2:
            raise ValueError(f"weights[{place}]: expected [N, K], got {list(weight.shape)}")
        _check(weight, weight.shape, packed, result)
        if weight.device != weights[0].device:
            raise ValueError(f"weights: expected all on {weights[0].device}, got {weight.device} too")
    if not weights:
        return
    supported = all(_supported(weight, result) for weight, result in zip(weights, out, strict=True))
    if weights[0].device.type != "cpu" or not supported:
        for weight, packed, result in zip(weights, bits, out, strict=True):
            masked_weight(weight, packed, out=result)
        return
    with torch.no_grad():
        _op_many.pick(weights[0].device)(list(weights), list(bits), list(out))
    bump_versions(out)


def masked_weights_reference(weights: Sequence[Tensor], bits: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """The definition: one matrix after the other."""
    for weight, packed, result in zip(weights, bits, out, strict=True):
        masked_weight_reference(weight, packed, weight.shape, result)


def masked_weight_reference(weight: Tensor, bits: Tensor, grid: Sequence[int], out: Tensor) -> None:
    """The definition: bits to a bool grid, the grid to the weight's shape, select, cast."""
    kept = expand_grid(unpack_bits(bits, tuple(grid)), weight.shape)
    out.copy_(torch.where(kept, weight, torch.zeros((), dtype=weight.dtype, device=weight.device)))


def _check(weight: Tensor, cells: Sequence[int], bits: Tensor, out: Tensor) -> None:
    check_bits(bits, cells[0] * cells[1])
    check_out("out", out, weight)
    if bits.device != weight.device:
        raise ValueError(f"bits: expected on {weight.device} like weight, got {bits.device}")


def _supported(weight: Tensor, out: Tensor) -> bool:
    return weight.dtype in COMPUTE_DTYPES and out.dtype in COMPUTE_DTYPES and weight.is_contiguous()


def check_out(name: str, out: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless `out` can be written as the masked copy of `weight`."""
    if out.shape != weight.shape or not out.is_floating_point():
        raise ValueError(
            f"{name}: expected float {list(weight.shape)} like its weight, got {out.dtype} {list(out.shape)}"
        )
    if not out.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(out.stride())}")
    if out.device != weight.device:
        raise ValueError(f"{name}: expected on {weight.device} like its weight, got {out.device}")


def bump_versions(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that these were written: a backward that saved an earlier value must fail, not use the new one."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


_op = Op("masked_weight", masked_weight_reference, lambda weight, bits, grid, out: None, mutates=("out",))
_op_many = Op("masked_weights", masked_weights_reference, lambda weights, bits, out: None, mutates=("out",))
