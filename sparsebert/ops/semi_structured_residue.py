"""What of a weight does not fit into 2:4, in the order in which the packed layer multiplies it.

At 90 % sparsity a random unstructured weight has more than two kept in 0.4 % of its groups of four, 0.1 % of its places
in all. A *group* here is 64 rows of the weight `[N, K]`, two to each 128 rows; a *step* is 64 columns. The columns that
a group has residue in are its *slots*, gathered from x as the steps pass, at most 64 in a *chunk* of steps; then the
group's 64 rows of those columns are multiplied as a dense matrix, 16 slots to a *product*.

- `spans`, int32 `[groups, steps]`: a step's first slot in its chunk (bits 0 to 7), how many it has (8 to 14), whether
  the chunk ends with it (15), and the chunk (16 on).
- `columns`, uint8 `[groups, chunks, 64]`: each slot's column within its step.
- `values` `[groups, chunks, products, 128, 8]`: what each of 128 threads holds of a product's operand A, rows and slots
  as in wgmma.mma_async m64nNk16 (PTX ISA, "register fragments").
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SLOTS", "packed_residue", "unpacked_residue"]

# csrc/two_four.h has the same numbers.
GROUP_ROWS, STEP_COLS, SLOTS, SLOTS_OF_PRODUCT = 64, 64, 64, 16


def packed_residue(residue: Tensor, kept: Tensor | None = None) -> list[Tensor]:
    """`[spans, columns, values]` (see the module) of a residue, for `semi_structured_packed_linear`.

    Args:
        residue: `[N, K]`, bfloat16 or float16; 0 where there is none.
        kept: bool `[N, K]`, True where there is some, be it 0; None: where it is not 0.

    Raises:
        ValueError: no matrix of 16-bit floats.
    """
    if residue.dim() != 2 or residue.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"residue: expected bfloat16 or float16 [N, K], got {residue.dtype} {list(residue.shape)}")
    (n, k), device = residue.shape, residue.device
    groups, steps = 2 * -(-n // (2 * GROUP_ROWS)), -(-k // STEP_COLS)
    kept = residue.detach().ne(0) if kept is None else kept
    used = _padded(kept, groups, steps).view(groups, GROUP_ROWS, -1).any(1)
    counts = used.view(groups, steps, STEP_COLS).sum(2)
    per, chunks, most = _cut(counts)
    filled = _padded(residue.detach(), groups, chunks * per).view(groups, GROUP_ROWS, chunks, per * STEP_COLS)
    filled = filled.permute(0, 2, 3, 1)
    used = torch.nn.functional.pad(used, (0, (chunks * per - steps) * STEP_COLS)).view(groups, chunks, -1)
    group, chunk, column = used.nonzero(as_tuple=True)
    slot = (used.cumsum(2) - 1)[group, chunk, column]
    columns = torch.zeros(groups, chunks, SLOTS, dtype=torch.uint8, device=device)
    columns[group, chunk, slot] = (column % STEP_COLS).to(torch.uint8)
    products = max(1, -(-most // SLOTS_OF_PRODUCT))
    values = residue.new_zeros(groups, chunks, SLOTS, GROUP_ROWS)
    values[group, chunk, slot] = filled[group, chunk, column]
    values = values[:, :, : products * SLOTS_OF_PRODUCT].view(groups, chunks, products, 2, 4, 2, 4, 2, 8)
    # Slots are by product, half, thread of four, one of two; rows by warp, half, thread's.
    values = values.permute(0, 1, 2, 6, 8, 4, 3, 7, 5).reshape(groups, chunks, products, 128, 8)
    step = torch.arange(steps, device=device)
    ends = (step % per == per - 1) | (step == steps - 1)
    padded = torch.nn.functional.pad(counts, (0, chunks * per - steps)).view(groups, chunks, per)
    first = (padded.cumsum(2) - padded).view(groups, -1)[:, :steps]
    spans = first | counts << 8 | ends.long() << 15 | (step // per) << 16
    return [spans.to(torch.int32), columns, values.contiguous()]


def _padded(matrix: Tensor, groups: int, steps: int) -> Tensor:
    """The matrix with zeros below and to the right, up to whole groups and so many steps."""
    n, k = matrix.shape
    return torch.nn.functional.pad(matrix, (0, steps * STEP_COLS - k, 0, groups * GROUP_ROWS - n))


def _cut(counts: Tensor) -> tuple[int, int, int]:
    """Steps to a chunk, chunks, and slots of the fullest: the longest chunks of which none has more than `SLOTS`."""
    groups, steps = counts.shape
    for per in range(max(steps, 1), 0, -1):
        chunks = -(-max(steps, 1) // per)
        full = torch.nn.functional.pad(counts, (0, chunks * per - steps)).view(groups, chunks, per).sum(2)
        most = int(full.max()) if full.numel() else 0
        if most <= SLOTS:
            return per, chunks, most
    raise AssertionError("a step has no more columns than there are slots")


def unpacked_residue(parts: list[Tensor], shape: tuple[int, int]) -> Tensor:
    """The residue `[N, K]` that `packed_residue` was made of."""
    spans, columns, values = parts
    groups, steps = spans.shape
    chunks, products = values.shape[1:3]
    # Back to a row to a slot.
    rows = values.view(groups, chunks, products, 4, 8, 4, 2, 2, 2).permute(0, 1, 2, 6, 5, 8, 3, 7, 4)
    rows = rows.reshape(groups, chunks, products * SLOTS_OF_PRODUCT, GROUP_ROWS)
    dense = values.new_zeros(groups, steps * STEP_COLS, GROUP_ROWS)
    words = spans.long()
    first, count, chunk = words & 255, words >> 8 & 127, words >> 16
    slot = torch.arange(SLOTS, device=values.device)
    taken = (slot >= first[..., None]) & (slot < (first + count)[..., None])
    group, step, at = taken.nonzero(as_tuple=True)
    chunk = chunk[group, step]
    dense[group, step * STEP_COLS + columns[group, chunk, at].long()] = rows[group, chunk, at]
    return dense.permute(0, 2, 1).reshape(groups * GROUP_ROWS, -1)[: shape[0], : shape[1]]
