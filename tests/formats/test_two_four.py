from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsebert.formats import pack_two_four, split_two_four


@given(
    shape=st.sampled_from([(1, 4), (9, 16), (33, 132), (0, 8), (3, 0)]),
    density=st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_the_parts_add_up_exactly_and_share_no_place(
    shape: tuple[int, int], density: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    mask = torch.rand(shape, generator=generator) < density
    semi, residue = split_two_four(weight, mask)
    semi.check()
    residue.check()
    left = residue.stored()
    dense = semi.to_dense()
    assert torch.equal(torch.where(left, residue.to_dense(), dense), torch.where(mask, weight, 0.0))
    assert not dense[left].any()
    # No more is left over than must be.
    counts = mask.view(shape[0], shape[1] // 4, 4).sum(2)
    assert residue.nnz == int((counts - 2).clamp(min=0).sum())
    # What is left over is no larger than what stayed in its group.
    groups = weight.abs().view(shape[0], shape[1] // 4, 4)
    least = (
        torch.where((mask & ~left).view_as(groups), groups, torch.inf).amin(2, keepdim=True) if counts.numel() else 0
    )
    assert ((groups <= least) | ~left.view_as(groups)).all()


def test_of_a_random_weight_little_is_left_over() -> None:
    generator = torch.Generator().manual_seed(0)
    for density in (0.1, 0.05, 0.5):
        mask = torch.rand(768, 768, generator=generator) < density
        _, residue = split_two_four(torch.randn(768, 768, generator=generator), mask)
        # 3 of 4 kept leave one over, 4 of 4 two.
        share = (4 * density**3 * (1 - density) + 2 * density**4) / 4
        assert abs(residue.nnz / mask.numel() - share) < 0.1 * share + 1e-4


def test_a_layer_is_the_sum_of_both() -> None:
    torch.manual_seed(0)
    weight, mask, x = torch.randn(24, 32).double(), torch.rand(24, 32) < 0.3, torch.randn(5, 32).double()
    semi, residue = split_two_four(weight, mask)
    torch.testing.assert_close(semi.linear(x) + residue.linear(x), x @ (weight * mask).t())


def test_a_nan_stays_and_odd_columns_are_refused() -> None:
    weight = torch.tensor([[1.0, float("nan"), 3.0, torch.inf]])
    semi, residue = split_two_four(weight)
    assert semi.to_dense().isnan().tolist() == [[False, True, False, False]]
    assert semi.to_dense()[0, 3] == torch.inf and residue.to_dense().tolist() == [[1.0, 0.0, 3.0, 0.0]]
    with pytest.raises(ValueError, match=r"weight: expected a multiple of 4 columns, got \[2, 6\]"):
        split_two_four(torch.ones(2, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_it_runs_the_whole_weight(dtype: torch.dtype) -> None:
    weight, mask, x = torch.randn(136, 72).to(dtype), torch.rand(136, 72) < 0.3, torch.randn(5, 72).to(dtype)
    stored, dense = pack_two_four(weight, mask), torch.where(mask, weight, 0.0)
    assert torch.equal(stored.to_dense(), dense)
    bias = torch.randn(136).to(dtype)
    expected = torch.nn.functional.gelu(torch.nn.functional.linear(x.double(), dense.double(), bias.double()))
    torch.testing.assert_close(stored.linear(x, bias, "gelu").double(), expected, rtol=0.01, atol=0.01)
    assert stored.nbytes == 2 * 2 * 9216 + sum(part.numel() * part.element_size() for part in stored.residue)
