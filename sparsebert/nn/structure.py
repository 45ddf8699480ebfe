"""What a mask's structure allows: the formats that can hold it, and how much of the weight each would store."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparsebert.errors import UserError
from sparsebert.nn.masked import MaskedLinear
from sparsebert.ops.bitmap_linear import DTYPES as BITMAP_DTYPES
from sparsebert.ops.bits import expand_grid, unpack_bits
from sparsebert.ops.semi_structured_pack import DTYPES as TWO_FOUR_DTYPES
from sparsebert.ops.semi_structured_pack import on_hopper

__all__ = ["Structure", "check_dtype", "check_mask", "check_weight", "kept_of", "mask_of", "structure_of"]

# What a weight may be stored in.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Kernels on x86 take bf16 in pairs of columns and fp32 in single ones; the squares are for both.
BLOCKS = {
    torch.bfloat16: ((4, 2), (8, 2), (16, 2)),
    torch.float32: ((8, 1), (16, 1)),
}
SQUARES = ((16, 16), (32, 32), (64, 64))
# What a GPU has kernels for: its matrix units take no blocks of 8 x 2, and one pattern.
GPU_SQUARES = (*SQUARES, (128, 128))
GPU_PATTERNS = ((2, 4),)
# Of equal ratios the smaller group first: what fits it fits the larger one too, and is stored in fewer bits.
PATTERNS = ((1, 2), (1, 4), (2, 4), (1, 8), (2, 8), (4, 8), (1, 16), (2, 16), (4, 16), (8, 16))

# Blocks that store more than this many times the kept weights, or nearly all, gain nothing.
MOST_FILL = 4
MOST_DENSITY = 0.9
# A kept weight may be zero by chance: so many of an n:m pattern's places must be in use for it to be one.
LEAST_PATTERN = 0.95
# With more than this share of all places beside its 2:4, most columns of 64 rows have some, and are multiplied densely.
MOST_BESIDE = 0.01


@dataclass(frozen=True, eq=False)
class Structure:
    """A mask `[N, K]`, True where kept, and what can be read off it."""

    mask: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)`."""
        return self.mask.shape[0], self.mask.shape[1]

    @property
    def on_gpu(self) -> bool:
        """Whether it lies on a GPU, where other formats have kernels."""
        return self.mask.is_cuda

    @property
    def on_hopper(self) -> bool:
        """Whether it lies on an H100 or H200."""
        return self.mask.is_cuda and on_hopper(self.mask.device.index)

    @cached_property
    def kept(self) -> int:
        """Number of kept weights."""
        return int(self.mask.sum())

    @property
    def size(self) -> int:
        """Number of all weights."""
        return self.mask.numel()

    def candidates(self, dtype: torch.dtype, trainable: bool) -> tuple[dict[str, int], dict[str, str]]:
        """Formats worth a measurement with the number of weights each stores, and why others are none.

        Args:
            dtype: of the weight; it decides which sizes of blocks there are kernels for.
            trainable: whether formats that store pruned weights as zeros are left out.
        """
        stored = {"unstructured": self.kept, **self._compact(), **self._patterns()}
        if self.on_gpu and dtype in BITMAP_DTYPES:
            stored["bitmap"] = self.kept
        left_out = {}
        beside = self._beside_two_four() if self.on_hopper and dtype in TWO_FOUR_DTYPES else None
        if beside is not None and "semi_structured:2:4" not in stored:
            if beside <= MOST_BESIDE * self.size:
                stored["two_four"] = self.size // 2 + beside
            else:
                left_out["two_four"] = (
                    f"{beside / self.size:.1%} of its places have a weight that does not fit into 2:4"
                )
        for block in GPU_SQUARES if self.on_gpu else (*BLOCKS.get(dtype, ()), *SQUARES):
            spelling = f"blocks:{block[0]}x{block[1]}"
            count = self.in_blocks(block)
            if count is None:
                left_out[spelling] = f"blocks of {block[0]}x{block[1]} do not divide {list(self.shape)}"
            elif count > min(MOST_FILL * self.kept, MOST_DENSITY * self.size):
                left_out[spelling] = f"its blocks would store {count / self.size:.0%} of the weight"
            else:
                stored[spelling] = count
        for spelling in [spelling for spelling, count in stored.items() if trainable and count != self.kept]:
            left_out[spelling] = "it would store pruned weights, which training would change"
            del stored[spelling]
        return stored, left_out

    def bucket(self, dtype: torch.dtype, trainable: bool) -> dict[str, str]:
        """The structure to two digits: weights with equal ones are taken to run equally fast."""
        stored, _ = self.candidates(dtype, trainable)
        return {spelling: f"{count / max(self.size, 1):.2g}" for spelling, count in stored.items()}

    def in_blocks(self, block: tuple[int, int]) -> int | None:
        """How many weights lie in blocks `(R, C)` with a kept one; None where the blocks do not divide the mask."""
        (n, k), (height, width) = self.shape, block
        if n % height or k % width or not self.size:
            return None
        cells = self.mask.view(n // height, height, k // width, width)
        return int(cells.any(3).any(1).sum()) * height * width

    def _compact(self) -> dict[str, int]:
        rows, columns = int(self.mask.any(1).sum()), int(self.mask.any(0).sum())
        return {} if (rows, columns) == self.shape else {"compact": rows * columns}

    def _beside_two_four(self) -> int | None:
        """How many weights are left over where each four keeps two; None for sizes that the kernel does not take."""
        if self.shape[0] % 8 or self.shape[1] % 8 or not self.size:
            return None
        return int((self.mask.view(self.shape[0], -1, 4).sum(2) - 2).clamp(min=0).sum())

    def _patterns(self) -> dict[str, int]:
        found: dict[float, tuple[str, int]] = {}
        for n, m in GPU_PATTERNS if self.on_gpu else PATTERNS:
            places = self.size // m * n
            if self.shape[1] % m or n / m in found or not LEAST_PATTERN * places <= self.kept <= places or not places:
                continue
            groups = self.mask.view(self.shape[0], -1, m).sum(2, dtype=torch.uint8)
            if int(groups.max()) <= n:
                found[n / m] = (f"semi_structured:{n}:{m}", places)
        return dict(found.values())


def structure_of(weight: Tensor, mask: Tensor | None = None) -> Structure:
    """The structure of `mask` (bool `[N, K]`, True where kept), or of the weight's own zeros.

    Raises:
        ValueError, TypeError: as `check_weight` and `check_mask` do.
    """
    check_weight(weight)
    if mask is None:
        return Structure(weight.detach() != 0)
    check_mask(mask, weight)
    return Structure(mask.detach().contiguous())


def check_dtype(dtype: object) -> None:
    """Raise unless `dtype`, an argument of that name, is None or a dtype that weights can be stored in."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype: expected a float dtype such as torch.bfloat16, got {dtype}")


def check_weight(weight: Tensor) -> None:
    """Raise unless `weight` is a plain float matrix with data."""
    if is_lazy(weight):
        raise ValueError("weight: expected data, got a lazy layer's, which has no shape yet; run the layer once first")
    if not weight.is_floating_point() or weight.is_quantized or weight.dtype not in DTYPES:
        raise TypeError(f"weight: expected a float tensor, got {weight.dtype}; quantised weights cannot be stored here")
    if type(weight) not in (Tensor, torch.nn.Parameter) or weight.layout != torch.strided:
        kind = type(weight).__name__ if weight.layout == torch.strided else weight.layout
        raise TypeError(f"weight: expected a plain tensor, got a {kind}; convert it to one first")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected [N, K], got {list(weight.shape)}")
    if weight.is_meta:
        raise ValueError("weight: expected data, got a tensor on the meta device; load the model's weights first")


def check_mask(mask: Tensor, weight: Tensor) -> None:
    """Raise unless `mask` is a bool tensor like `weight`."""
    if not isinstance(mask, Tensor) or mask.layout != torch.strided:
        kind = mask.layout if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: expected a bool tensor {list(weight.shape)}, got a {kind}; convert it to one first")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected bool, True where kept, got {mask.dtype}; use mask != 0")
    if mask.shape != weight.shape:
        raise ValueError(f"mask: expected {list(weight.shape)} like the weight, got {list(mask.shape)}")
    if mask.device != weight.device:
        raise ValueError(f"mask: expected on {weight.device} like the weight, got {mask.device}")


def mask_of(linear: nn.Module) -> Tensor | None:
    """The mask of a `MaskedLinear`, bool `[N, K]`; None for any other module."""
    if not isinstance(linear, MaskedLinear):
        return None
    return expand_grid(unpack_bits(linear.bits, linear.grid), linear.weight.shape)


def kept_of(linear: nn.Linear | MaskedLinear, mask: Tensor | None) -> Tensor:
    """Where the weight is kept, from the arguments of `from_linear`, checked."""
    weight = linear.weight
    check_weight(weight)
    own = mask_of(linear)
    if own is not None and mask is not None:
        raise UserError("mask: a MaskedLinear has its own; leave it out")
    kept = own if mask is None else mask
    if kept is None:
        return weight.detach() != 0
    check_mask(kept, weight)
    return kept
