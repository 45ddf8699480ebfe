from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.linear_cases import DTYPES, check_error, pick_mask, skip_without
from torch import Tensor

from sparsebert.formats import Blocks
from sparsebert.ops import block_sparse_sddmm
from sparsebert.ops._backend import OPS

shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
drawn = given(
    rows=st.sampled_from([0, 1, 2, 3, 5, 16, 33, 130]),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 6)),
    block=st.sampled_from([(8, 2), (16, 2), (4, 2), (1, 1), (16, 16), (8, 1), (2, 32), (3, 5), (64, 1), (1, 40)]),
    density=st.sampled_from([0.0, 0.02, 0.2, 0.9, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)


@pytest.fixture(autouse=True)
def _kernels(request: pytest.FixtureRequest) -> None:
    skip_without(request, "block_sparse_sddmm")


def make(
    rows: int = 5,
    grid: tuple[int, int] = (3, 7),
    block: tuple[int, int] = (3, 2),
    density: float = 0.4,
    dtype: Any = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Blocks]:
    generator = torch.Generator().manual_seed(seed)
    n, k = grid[0] * block[0], grid[1] * block[1]
    grad, x = (torch.randn(rows, size, generator=generator).to(dtype) for size in (n, k))
    kept = pick_mask(grid, density, generator).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return grad, x, Blocks.from_dense(torch.ones(n, k, dtype=dtype), kept, block=block)


def call(grad: Tensor, x: Tensor, stored: Blocks) -> Tensor:
    return block_sparse_sddmm(grad, x, stored.columns, stored.row_starts, stored.block)


def check_budget(grad: Tensor, x: Tensor, stored: Blocks) -> None:
    result = call(grad, x, stored)
    assert result.shape == stored.values.shape and result.dtype == x.dtype
    kept = stored.stored()
    dense = stored.replaced(values=result).to_dense()
    usual, exact = (grad.t() @ x) * kept, (grad.double().t() @ x.double()) * kept
    check_error(dense, usual, exact, 3.0, grad.double().abs().t() @ x.double().abs())


@shared
@drawn
def test_within_torchs_own_error_on_each_backend(backend: str, **drawn: Any) -> None:
    check_budget(*make(**drawn))


@shared
@drawn
def test_within_torchs_own_error_on_each_instruction_set(isa: str, **drawn: Any) -> None:
    check_budget(*make(**drawn))


def test_strides_and_other_dtypes() -> None:
    for dtype in (torch.float16, torch.float64, torch.float32):
        grad, x, stored = make(12, dtype=dtype)
        check_budget(grad[1::2], x.t().contiguous().t()[:6], stored)


def test_a_nan_stays_at_its_row_and_column(backend: str) -> None:
    grad, x, stored = make(3, density=1.0)
    grad[1, 4], x[2, 5] = float("nan"), float("inf")
    grad[2] = 1
    dense = stored.replaced(values=call(grad, x, stored)).to_dense()
    assert dense[4].isnan().all() and not dense[[0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()
    assert dense[:4, 5].isinf().all() and not dense[:4, :5].isinf().any()


def test_autocast_does_not_change_the_dtype(backend: str) -> None:
    grad, x, stored = make()
    plain = call(grad, x, stored)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = call(grad, x, stored)
    assert under.dtype == torch.float32 and torch.equal(under, plain)


def test_repeats_and_threads_give_the_same_bits(backend: str, threads: Callable[[int], None]) -> None:
    if backend == "reference":
        pytest.skip("torch's own products depend on the number of threads")
    for dtype in DTYPES:
        case = make(70, (48, 384), (8, 2), 0.2, dtype)
        first = call(*case)
        for number in (1, 2, 3):
            threads(number)
            assert torch.equal(first, call(*case))


def test_what_does_not_fit_is_named() -> None:
    grad, x, stored = make()
    for change, message in (
        ({"grad": grad[0]}, r"grad: expected float \[M, N\], got torch\.float32 \[9\]"),
        ({"grad": grad.long()}, r"grad: expected float"),
        ({"x": x[:3]}, r"x: expected torch\.float32 \[5, K\] on cpu like grad, got torch\.float32 \[3, 14\]"),
        ({"x": x.bfloat16()}, r"got torch\.bfloat16"),
        ({"x": x.to("meta")}, "on meta"),
        ({"stored": stored.replaced(columns=stored.columns.long())}, r"columns: expected torch\.int32 .*, got"),
        (
            {"stored": stored.replaced(row_starts=stored.row_starts[1:])},
            r"row_starts: expected torch\.int32 \[4\], got",
        ),
        (
            {"stored": stored.replaced(block=(3, 4))},
            "block: expected R x C with R dividing 9 and C dividing 14, got 3x4",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call(**{"grad": grad, "x": x, "stored": stored, **change})


def test_opcheck(backend: str) -> None:
    grad, x, stored = make()
    op = OPS["block_sparse_sddmm"].pick(torch.device("cpu"))
    torch.library.opcheck(op, (grad, x, stored.columns, stored.row_starts, list(stored.block)))
