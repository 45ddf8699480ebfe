from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsebert.ops import nm_mask, unpack_bits
from sparsebert.ops._backend import OPS

shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


def oracle(scores: Tensor, n: int, m: int, threshold: float | None) -> list[list[bool]]:
    """The promise, group by group: a stable ascending order, of which the last n are kept."""
    groups = scores.double().numpy().reshape(-1, m) + 0.0
    kept = np.zeros(groups.shape, dtype=bool)
    for group, row in zip(groups, kept, strict=True):
        row[np.argsort(group, kind="stable")[m - n :]] = True
        if threshold is not None:
            row |= group > threshold
    return kept.reshape(scores.shape).tolist()


@shared
@given(
    rows=st.integers(0, 9),
    groups=st.integers(1, 11),
    m=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16, 31, 32]),
    share=st.floats(0, 1),
    threshold=st.sampled_from([None, 0.0, 1.0, 0.1]),
    ties=st.booleans(),
    seed=st.integers(0, 999),
)
def test_the_n_largest_are_kept_and_of_equals_the_latest(
    isa: str, rows: int, groups: int, m: int, share: float, threshold: float | None, ties: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, groups * m)
    scores = (
        torch.randint(-1, 2, shape, generator=generator).float() if ties else torch.randn(shape, generator=generator)
    )
    n = round(share * m)
    bits = nm_mask(scores, n, m, threshold)
    assert unpack_bits(bits, shape).tolist() == oracle(scores, n, m, threshold)


def test_by_hand(backend: str) -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 4.0, 0.0, -0.0, 0.0, -1.0]])
    assert nm_mask(scores, 2, 4).tolist() == [0b01101010]
    assert nm_mask(scores, 1, 4, threshold=1.5).tolist() == [0b01001110]
    assert nm_mask(scores, 0, 4).tolist() == [0] and nm_mask(scores, 4, 4).tolist() == [255]


def test_infinities_rank_at_the_ends(backend: str) -> None:
    scores = torch.tensor([[float("-inf"), float("inf"), 0.0, float("-inf")]])
    assert unpack_bits(nm_mask(scores, 2, 4), (1, 4)).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("m", [4, 16, 31])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nan_is_an_error(backend: str, m: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if dtype == torch.float64:
        monkeypatch.delenv("SPARSEBERT_BACKEND")
    scores = torch.randn(3, 5 * m, dtype=dtype)
    scores[2, -1] = float("nan")
    with pytest.raises(ValueError, match="scores: has a NaN"):
        nm_mask(scores, 1, m)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    scores = (1 + torch.arange(64, dtype=torch.float64).view(4, 16) * 1e-12).to(dtype)
    assert unpack_bits(nm_mask(scores, 2, 4), (4, 16)).tolist() == oracle(scores, 2, 4, None)


def test_strides_do_not_matter(backend: str) -> None:
    whole = torch.randn(16, 20)
    for scores in (whole.t()[:, 8:], whole[1:, 4:]):
        assert torch.equal(nm_mask(scores, 2, 4), nm_mask(scores.clone(), 2, 4))


@pytest.mark.parametrize(
    ("n", "m", "shape", "message"),
    [
        (3, 2, (2, 4), "expected 0 <= n <= m .* got 3:2"),
        (1, 33, (2, 33), "1 <= m <= 32, got 1:33"),
        (-1, 4, (2, 4), "got -1:4"),
        (1, 0, (2, 4), "got 1:0"),
        (2, 4, (2, 6), r"scores: expected \[N, K\] with K a multiple of 4, got \[2, 6\]"),
        (2, 4, (8,), r"scores: expected \[N, K\]"),
    ],
)
def test_what_does_not_fit_is_named(n: int, m: int, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nm_mask(torch.zeros(shape), n, m)


def test_opcheck(backend: str) -> None:
    op = OPS["nm_mask"].pick(torch.device("cpu"))
    for threshold in (None, 0.5):
        torch.library.opcheck(op, (torch.randn(3, 12), 2, 4, threshold))
