from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsebert.ops.bits import block_sum, bytes_for, check_grid, expand_grid, pack_bits, unpack_bits


@given(rows=st.integers(0, 9), cols=st.integers(0, 21), seed=st.integers(0, 99))
def test_bits_are_numpys_little_endian_packbits(rows: int, cols: int, seed: int) -> None:
    mask = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack_bits(mask)
    assert bits.dtype == torch.uint8 and bits.shape == (bytes_for(rows * cols),)
    assert bits.tolist() == np.packbits(mask.numpy(), axis=None, bitorder="little").tolist()
    assert torch.equal(unpack_bits(bits, (rows, cols)), mask)


def test_a_strided_mask_packs_in_row_major_order() -> None:
    mask = torch.rand(12, 10) < 0.5
    assert torch.equal(pack_bits(mask.t()), pack_bits(mask.t().contiguous()))


def test_pack_bits_wants_bool() -> None:
    with pytest.raises(TypeError, match=r"mask: expected bool, got torch\.float32"):
        pack_bits(torch.ones(3))


@pytest.mark.parametrize("bits", [torch.zeros(3, dtype=torch.uint8), torch.zeros(2), torch.zeros(1, 2)])
def test_unpack_bits_names_a_wrong_size(bits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"bits: expected uint8 \[2\] for 12 entries"):
        unpack_bits(bits, (3, 4))


def test_a_grid_covers_equal_blocks() -> None:
    assert check_grid((6, 8), (3, 2)) == (2, 4)
    values = torch.tensor([[1.0, 2.0]])
    assert torch.equal(expand_grid(values, (2, 4)), torch.tensor([[1.0, 1, 2, 2], [1, 1, 2, 2]]))
    assert torch.equal(block_sum(torch.ones(2, 4), (1, 2)), torch.tensor([[4.0, 4.0]]))


@pytest.mark.parametrize("grid", [(4, 8), (6, 3), (0, 8), (6,), (12, 8)])
def test_a_grid_that_does_not_divide_is_refused(grid: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="grid"):
        check_grid((6, 8), grid)
