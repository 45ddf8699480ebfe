from __future__ import annotations

import pytest
import torch
from formats.stored import mask_for, numbered
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsebert.formats import Bitmap
from sparsebert.ops.bitmap_linear import LANES, TILE_COLS, TILE_ROWS, from_tiles, in_tiles


def by_definition(weight: Tensor, mask: Tensor) -> dict[str, list[float]]:
    """The three tensors by loops over tiles, lanes and bits."""
    n, k = weight.shape
    values: list[float] = []
    words, starts = [], [0]
    for top in range(0, n, TILE_ROWS):
        for left in range(0, k, TILE_COLS):
            for lane in range(LANES):
                word = 0
                for bit in range(32):
                    row = top + lane // 4 + 8 * (bit // 2 % 2)
                    column = left + 16 * (lane % 4) + 4 * (bit // 8) + 2 * (bit // 4 % 2) + bit % 2
                    if row < n and column < k and mask[row, column]:
                        word |= 1 << bit
                        values.append(weight[row, column].item())
                words.append(word - (1 << 32) if word >> 31 else word)
            starts.append(len(values))
    return {"values": values, "bits": words, "starts": starts}


@given(
    shape=st.sampled_from([(9, 14), (16, 64), (33, 65), (15, 130), (1, 1)]),
    density=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    seed=st.integers(0, 99),
)
def test_bits_and_values_are_as_defined(shape: tuple[int, int], density: float, seed: int) -> None:
    weight, mask = numbered(shape), mask_for("bitmap", shape, density, seed)
    stored = Bitmap.from_dense(weight, mask)
    found = {name: tensor.flatten().tolist() for name, tensor in stored.tensors().items()}
    assert found == by_definition(weight, mask)


def test_tiles_and_back() -> None:
    matrix = numbered((37, 150))
    assert torch.equal(from_tiles(in_tiles(matrix), matrix.shape), matrix)
    # A lane's 8 words of a row are 16 columns one after another.
    lane = in_tiles(numbered((16, 64)))[0, 0, 4 * 3 + 2].view(4, 2, 2, 2)
    assert lane[:, :, 0].flatten().tolist() == list(range(3 * 64 + 33, 3 * 64 + 49))
    assert lane[:, :, 1].flatten().tolist() == list(range(11 * 64 + 33, 11 * 64 + 49))


def test_bytes_of_a_layer_of_bert() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((768, 768), (3072, 768), (768, 3072)):
        weight = torch.randn(shape, generator=generator).bfloat16()
        mask = torch.rand(shape, generator=generator) < 0.2
        assert Bitmap.from_dense(weight, mask).nbytes <= 0.28 * 2 * weight.numel()


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("bits", 31, 1 << 30, "bits: expected zeros beyond the weight's edges, got 1073741824 at 31"),
        ("bits", 0, 0, "bits: expected 126 of them set, as many as values, got 98"),
        ("starts", 0, 1, "starts: expected the sums of bits before each tile, got 1 at 0"),
        ("starts", 1, 125, "starts: expected the sums of bits before each tile, got 125 at 1"),
    ],
)
def test_what_cannot_be_is_named(name: str, place: int, value: int, message: str) -> None:
    stored = Bitmap.from_dense(torch.ones(9, 14))
    changed = stored.tensors()[name].clone()
    changed.view(-1)[place] = value
    with pytest.raises(ValueError, match=message):
        stored.replaced(**{name: changed}).check()
