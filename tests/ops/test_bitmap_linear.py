from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.linear_cases import pick_mask
from ops.linears import LinearPromises
from torch import Tensor

from sparsebert.formats import Bitmap, Format
from sparsebert.ops import bitmap_decode, bitmap_gather, bitmap_linear
from sparsebert.ops._backend import OPS


class TestBitmapLinear(LinearPromises):
    op = "bitmap_linear"
    transposed_count = 0
    shapes = ((7, 9), (1, 1), (16, 64), (33, 70), (130, 65))

    def store(self, weight: Tensor, density: float, option: Any, generator: torch.Generator) -> Format:
        return Bitmap.from_dense(weight, pick_mask((weight.shape[0], weight.shape[1]), density, generator))

    def call(self, stored: Format, x: Tensor, values: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        assert isinstance(stored, Bitmap) and not options.pop("transposed", ())
        return bitmap_linear(x, values, stored.bits, stored.starts, bias, shape=stored.shape, **options)


def test_by_hand() -> None:
    """[[0, 2, 3]]: columns 1 and 2 of the first row are bits 1 and 4 of lane 0."""
    bits = torch.zeros(1, 1, 32, dtype=torch.int32)
    bits[0, 0, 0] = 0b10010
    starts, values = torch.tensor([0, 2]), torch.tensor([2.0, 3])
    y = bitmap_linear(torch.tensor([1.0, 10, 100]), values, bits, starts, shape=(1, 3))
    assert y.tolist() == [320]
    assert bitmap_decode(values, bits, starts, shape=(1, 3)).tolist() == [[0, 2, 3]]
    assert bitmap_gather(torch.tensor([[7.0, 8, 9]]), bits, starts, nnz=2).tolist() == [8, 9]


@pytest.mark.parametrize("shape", [(33, 70), (16, 64), (0, 4), (4, 0)])
def test_gather_is_the_inverse_of_decode(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    stored = Bitmap.from_dense(torch.randn(shape), torch.rand(shape) < 0.4)
    dense = bitmap_decode(stored.values, stored.bits, stored.starts, shape=shape)
    assert torch.equal(dense, stored.to_dense())
    assert torch.equal(bitmap_gather(dense, stored.bits, stored.starts, nnz=stored.nnz), stored.values)


def test_opcheck_of_both() -> None:
    stored = Bitmap.from_dense(torch.randn(33, 70), torch.rand(33, 70) < 0.4)
    index, cpu = (stored.bits, stored.starts), torch.device("cpu")
    torch.library.opcheck(OPS["bitmap_decode"].pick(cpu), (stored.values, *index, [33, 70]))
    torch.library.opcheck(OPS["bitmap_gather"].pick(cpu), (torch.randn(33, 70), *index, stored.nnz))


def test_what_does_not_fit_is_named() -> None:
    stored = Bitmap.from_dense(torch.ones(3, 5))
    index = (stored.bits, stored.starts)
    for call, message in (
        (lambda: bitmap_decode(torch.ones(3, 5), *index, shape=(3, 5)), r"values: expected float \[nnz\], got"),
        (lambda: bitmap_decode(stored.values, *index, shape=(30, 5)), r"bits: expected torch.int32 \[2, 1, 32\], got"),
        (lambda: bitmap_gather(torch.ones(15), *index, nnz=15), r"dense: expected float \[N, K\], got"),
        (lambda: bitmap_gather(torch.ones(3, 5), *index, nnz=16), "nnz: expected 0 to 15, got 16"),
        (lambda: bitmap_gather(torch.ones(3, 5), stored.bits, stored.starts[1:], nnz=15), "starts: expected torch"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
