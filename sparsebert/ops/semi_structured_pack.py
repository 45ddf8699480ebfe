"""A 2:4 weight in the order in which Hopper's sparse matrix units read it.

A *tile* is 128 rows and 64 columns of the weight `[N, K]`; tiles lie row of tiles after row of tiles, and beyond the
weight's edges there are zeros. A tile has 9216 bytes: 8192 of values, 16 bits each, and 1024 of positions.

- Values, by 64 rows, 32 columns, half of those, row: 8 stored weights, a row of a core matrix.
- Positions, a word of 32 bits to each thread `32 w + 4 r + 2 h + t` of the 128 that multiply 64 rows: four groups of
  row `16 w + r` in the lower half, of the row 8 below in the upper half, from column `32 h + 16 t` on, four bits to a
  group (PTX ISA, "Matrix fragments for wgmma.mma_async.sp m64nNk32").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsebert.ops import _linear
from sparsebert.ops._backend import Op, constant_result

__all__ = ["TILE_BYTES", "TILE_COLS", "TILE_ROWS", "semi_structured_pack", "semi_structured_pack_reference", "unpacked"]

# csrc/two_four.h has the same three numbers.
TILE_ROWS, TILE_COLS, TILE_BYTES = 128, 64, 9216

DTYPES = (torch.bfloat16, torch.float16)
_VALUE_BYTES = TILE_ROWS * TILE_COLS
# Places 0 and 1, for a group that is not there: the units want two places that ascend.
_NOTHING = 4


def semi_structured_pack(values: Tensor, positions: Tensor) -> Tensor:
    """A 2:4 weight, packed for `semi_structured_packed_linear`.

    Args:
        values: `[N, K / 2]`, bfloat16 or float16, K a multiple of 4.
        positions: uint8 `[N, ceil(K / 8)]`, both as in `semi_structured_linear`; taken on trust.

    Returns:
        uint8 `[ceil(N / 128), ceil(K / 64), 9216]` (see the module); a constant for autograd.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit, named.
    """
    if values.dim() != 2 or values.dtype not in DTYPES or values.shape[1] % 2:
        raise ValueError(
            f"values: expected bfloat16 or float16 [N, K / 2], K a multiple of 4, got {values.dtype} "
            f"{list(values.shape)}"
        )
    bytes_of_row = (values.shape[1] // 2 + 1) // 2
    _linear.check_index(values.device, positions=(positions, torch.uint8, [values.shape[0], bytes_of_row]))
    with torch.no_grad():
        return _op.pick(values.device)(values.detach().contiguous(), positions)


def semi_structured_pack_reference(values: Tensor, positions: Tensor) -> Tensor:
    """The definition."""
    rows, groups = values.shape[0], values.shape[1] // 2
    tall, wide = -(-rows // TILE_ROWS), -(-2 * values.shape[1] // TILE_COLS)
    weights = values.new_zeros(tall * TILE_ROWS, wide * TILE_COLS // 2)
    weights[:rows, : values.shape[1]] = values
    codes = torch.full((len(weights), weights.shape[1] // 2), _NOTHING, dtype=torch.uint8, device=values.device)
    codes[:rows, :groups] = torch.stack((positions & 15, positions >> 4), 2).flatten(1)[:, :groups]
    # Both by tile; then 64 rows, half of the tile's columns, and on.
    weights = weights.view(tall, 2, 64, wide, 2, 2, 8).permute(0, 3, 1, 4, 5, 2, 6)
    pairs = (
        (codes[:, ::2] | codes[:, 1::2] << 4).view(tall, 2, 4, 2, 8, wide, 2, 2, 2).permute(0, 5, 1, 2, 4, 6, 7, 3, 8)
    )
    flat = weights.reshape(tall, wide, _VALUE_BYTES // 2).view(torch.uint8)
    return torch.cat((flat, pairs.reshape(tall, wide, TILE_BYTES - _VALUE_BYTES)), 2)


def unpacked(packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The dense weight `[N, K]` of a packed one."""
    tall, wide = packed.shape[:2]
    weights = packed[..., :_VALUE_BYTES].contiguous().view(dtype).view(tall, wide, 2, 2, 2, 64, 8)
    weights = weights.permute(0, 2, 5, 1, 3, 4, 6).reshape(tall * TILE_ROWS, -1)
    pairs = packed[..., _VALUE_BYTES:].reshape(tall, wide, 2, 4, 8, 2, 2, 2, 2).permute(0, 2, 3, 7, 4, 1, 5, 6, 8)
    pairs = pairs.reshape(tall * TILE_ROWS, -1)
    codes = torch.stack((pairs & 3, pairs >> 2 & 3, pairs >> 4 & 3, pairs >> 6), 2).flatten(1)
    columns = codes + torch.arange(codes.shape[1], device=codes.device) // 2 * 4
    dense = weights.new_zeros(len(weights), 2 * weights.shape[1]).scatter_(1, columns, weights)
    return dense[: shape[0], : shape[1]]


# A fact of the machine, not part of a graph.
@constant_result
def on_hopper(index: int | None) -> bool:
    """Whether CUDA device `index` has the units that the packed order is for."""
    return torch.cuda.get_device_capability(index)[0] == 9


def _fake(values: Tensor, positions: Any) -> Tensor:
    tall, wide = -(-values.shape[0] // TILE_ROWS), -(-2 * values.shape[1] // TILE_COLS)
    return values.new_empty((tall, wide, TILE_BYTES), dtype=torch.uint8)


_op = Op("semi_structured_pack", semi_structured_pack_reference, _fake)
