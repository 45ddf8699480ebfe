"""The Triton feed-forward layer against the reference in float64, in one chunk and in several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.feed_forward import FeedForward, make
from torch import Tensor

from sparsebert.ops._backend import OPS
from sparsebert.ops._linear import ACTIVATIONS

pytest.importorskip("triton")


def in_chunks(case: FeedForward, activation: str, chunk: int) -> Tensor:
    from sparsebert.kernels.block_sparse_ffn import chunked

    up, down = case.layers()
    return chunked(case.x, up, down, case.shape, activation, chunk)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.sampled_from([1, 17, 40]),
    chunk=st.sampled_from([0, 16, 17, 128]),
    blocks=st.sampled_from([((16, 16), (16, 16)), ((64, 32), (32, 64)), ((8, 2), (16, 16)), ((48, 16), (3, 8))]),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 99),
)
def test_within_torchs_own_error(triton_backend: torch.device, chunk: int, activation: str, **drawn: Any) -> None:
    case = make(triton_backend, **drawn)
    case.check(in_chunks(case, activation, chunk) if chunk else case.call(activation), activation)


@pytest.mark.parametrize("bias", [True, False])
def test_chunks_do_not_change_the_result(triton_backend: torch.device, bias: bool) -> None:
    case = make(triton_backend, 50, ((64, 64), (32, 32)), 0.5, bias=bias)
    expected = case.call("gelu")
    for chunk in (16, 32, 64):
        y = in_chunks(case, "gelu", chunk)
        torch.testing.assert_close(y, expected)
        assert torch.equal(y, in_chunks(case, "gelu", chunk))


def test_no_tokens(triton_backend: torch.device) -> None:
    assert make(triton_backend, 0).call("gelu").shape == (0, 64)


def test_a_nan_stays_in_its_row(triton_backend: torch.device) -> None:
    case = make(triton_backend, 40, ((64, 64), (64, 64)), density=1.0)
    case.x[33, 3] = float("nan")
    for y in (case.call("gelu"), in_chunks(case, "gelu", 32)):
        assert y[33].isnan().all() and int(y.isnan().any(1).sum()) == 1


def test_opcheck(triton_backend: torch.device) -> None:
    case = make(triton_backend, 5)
    up, down = case.layers()
    op = OPS["block_sparse_ffn"].pick(triton_backend)
    torch.library.opcheck(op, (case.x, *up, *down, list(case.shape), "gelu"))


def test_the_plan_by_hand() -> None:
    from sparsebert.kernels.block_sparse_ffn import cost, plan, seconds

    shape, cache = (768, 3072, 768), 50 * 2**20
    sparse, half = (58, 64, 64), (288, 64, 64)
    # The whole intermediate is 25 MB at 4096 tokens, half of the cache: nothing to gain.
    assert plan(4096, shape, sparse, sparse, 2, 90, cache) == 0
    # Half of 50 MiB for two chunks: 2133 tokens, in whole tiles 2048.
    assert plan(16384, shape, sparse, sparse, 2, 90, cache) == 2048
    # At half density what programs load from the cache binds, and wider tiles load less.
    assert plan(16384, shape, half, half, 2, 90, cache) == 0
    assert seconds(16384, shape, half, half, 2, 90, 0) < seconds(16384, shape, half, half, 2, 90, 2048)
    two, one = cost(16384, shape, sparse, sparse), cost(16384, shape, sparse, sparse, chunk=2048)
    assert two.launches == 2 and one.launches == 9 and two.flops == one.flops
    assert two.moved - one.moved == 2 * 16384 * 3072 * 2
    weights = 2 * 58 * (64 * 64 * 2 + 4) + 4 * (49 + 13)
    assert one.moved == 2 * 16384 * 768 * 2 + weights + 2 * (3072 + 768)
