from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.linear_cases import check_error

from sparsebert.ops import pack_bits
from sparsebert.ops._backend import OPS
from sparsebert.ops.split_weight_grad import split_weight_grad, split_weight_grad_reference

shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@shared
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 30)),
    block=st.one_of(st.just((1, 1)), st.tuples(st.integers(1, 70), st.integers(1, 33))),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    needs=st.sampled_from([(True, True), (True, False), (False, True), (False, False)]),
    seed=st.integers(0, 999),
)
def test_both_parts(
    isa: str,
    grid: tuple[int, int],
    block: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    needs: tuple[bool, bool],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    shape = (grid[0] * block[0], grid[1] * block[1])
    product, weight = torch.randn(shape).to(dtypes[0]), torch.randn(shape).to(dtypes[1])
    bits = pack_bits(torch.rand(grid) < 0.5)
    scores, dense = split_weight_grad(product, weight, bits, grid, *needs)
    assert scores.dtype == torch.float32 and dense.dtype == weight.dtype
    exact = split_weight_grad_reference(product.double(), weight.double(), bits, grid, *needs)
    usual = split_weight_grad_reference(product, weight, bits, grid, *needs)
    # Where the terms of a sum cancel, its error is measured by them.
    terms = split_weight_grad_reference(product.double().abs(), weight.double().abs(), bits, grid, *needs)[0]
    check_error(scores, usual[0], exact[0], 3.0, terms)
    assert torch.equal(dense, usual[1])


def test_nothing_leaks_from_pruned_places(backend: str) -> None:
    product = torch.tensor([[float("nan"), float("inf"), 1.0, 2.0]])
    weight = torch.tensor([[1.0, 1.0, float("nan"), 3.0]])
    bits = pack_bits(torch.tensor([[False, False, True, True]]))
    scores, dense = split_weight_grad(product, weight, bits, (1, 4))
    assert dense.tolist() == [[0.0, 0.0, 1.0, 2.0]]
    assert scores[0, :3].isnan().tolist() == [True, False, True] and scores[0, 3] == 6.0


@pytest.mark.parametrize("grid", [(300, 64), (1, 64), (300, 1), (1, 1), (10, 8)])
def test_threads_and_repeats_give_the_same_bits(threads: Callable[[int], None], grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    product, weight = torch.randn(300, 64), torch.randn(300, 64)
    bits = pack_bits(torch.rand(grid) < 0.5)
    results = []
    for count in (1, 2, 2):
        threads(count)
        results.append(split_weight_grad(product, weight, bits, grid))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_cells_of_a_matrix_without_rows_have_gradient_0(backend: str) -> None:
    empty, bits = torch.empty(0, 512), pack_bits(torch.ones(2, 16, dtype=torch.bool))
    for _ in range(20):
        # Freed at once: what the allocator gives again holds NaN.
        torch.full((2, 16), torch.nan)
        scores, dense = split_weight_grad(empty, empty, bits, (2, 16))
        assert torch.equal(scores, torch.zeros(2, 16)) and dense.shape == (0, 512)


def test_float64_goes_to_the_reference() -> None:
    product, weight = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    scores, _ = split_weight_grad(product, weight, None, (2, 3), need_weight=False)
    torch.testing.assert_close(scores, (product * weight).view(2, 2, 3, 2).sum((1, 3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"product": torch.zeros(4, 9)}, r"product: expected \[4, 8\]"),
        ({"bits": None}, "bits: needed for the weight's gradient"),
        ({"grid": (3, 8)}, "does not divide"),
        ({"bits": torch.zeros(5, dtype=torch.uint8)}, r"bits: expected uint8 \[4\]"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], message: str) -> None:
    arguments = {
        "product": torch.zeros(4, 8),
        "weight": torch.zeros(4, 8),
        "bits": torch.zeros(4, dtype=torch.uint8),
        "grid": (4, 8),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        split_weight_grad(**arguments)


def test_opcheck(backend: str) -> None:
    op = OPS["split_weight_grad"].pick(torch.device("cpu"))
    bits = pack_bits(torch.rand(2, 4) < 0.5)
    torch.library.opcheck(op, (torch.randn(4, 8), torch.randn(4, 8), bits, [2, 4], True, True))
    torch.library.opcheck(op, (torch.randn(4, 8), torch.randn(4, 8), None, [4, 8], True, False))
