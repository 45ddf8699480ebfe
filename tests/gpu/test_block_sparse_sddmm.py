"""The Triton gradient of stored blocks against the reference in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.linear_cases import check_error, pick_mask
from torch import Tensor

from sparsebert.formats import Blocks
from sparsebert.ops import block_sparse_sddmm

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


def make(
    device: torch.device,
    m: int = 5,
    grid: tuple[int, int] = (3, 4),
    block: tuple[int, int] = (16, 16),
    density: float = 0.5,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Blocks]:
    generator = torch.Generator().manual_seed(seed)
    n, k = grid[0] * block[0], grid[1] * block[1]
    grad, x = (torch.randn(m, size, generator=generator).to(device, dtype) for size in (n, k))
    kept = pick_mask(grid, density, generator).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return grad, x, Blocks.from_dense(torch.ones(n, k, dtype=dtype), kept, block=block).to(device)


def call(grad: Tensor, x: Tensor, stored: Blocks) -> Tensor:
    return block_sparse_sddmm(grad, x, stored.columns, stored.row_starts, stored.block)


def check(grad: Tensor, x: Tensor, stored: Blocks) -> None:
    result = call(grad, x, stored)
    assert result.shape == stored.values.shape and result.dtype == x.dtype
    kept = stored.stored()
    usual, exact = (grad.t() @ x) * kept, (grad.double().t() @ x.double()) * kept
    scale = grad.double().abs().t() @ x.double().abs()
    check_error(stored.replaced(values=result).to_dense(), usual, exact, 3, scale)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.sampled_from([0, 1, 2, 17, 64, 65, 130]),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    block=st.sampled_from([(16, 16), (64, 64), (8, 2), (48, 16), (3, 5), (32, 64), (16, 128), (1, 1), (160, 32)]),
    density=st.sampled_from([0.0, 0.2, 0.9, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_within_torchs_own_error(triton_backend: torch.device, **drawn: Any) -> None:
    check(*make(triton_backend, **drawn))


@pytest.mark.parametrize("m", [1023, 1025, 1600])
def test_split_tokens_are_added_in_order(triton_backend: torch.device, m: int) -> None:
    case = make(triton_backend, m, (2, 3), (32, 64), 0.6)
    check(*case)
    assert torch.equal(call(*case), call(*case))


def test_a_nan_stays_at_its_row_and_column(triton_backend: torch.device) -> None:
    grad, x, stored = make(triton_backend, 3, density=1.0)
    grad[1, 4], x[2, 5] = float("nan"), float("inf")
    grad[2] = 1
    dense = stored.replaced(values=call(grad, x, stored)).to_dense()
    assert dense[4].isnan().all() and int(dense.isnan().any(1).sum()) == 1
    assert dense[:4, 5].isinf().all() and not dense[:4, :5].isinf().any()


def test_nothing_beyond_the_edges_is_used(triton_backend: torch.device) -> None:
    for block in ((16, 16), (3, 5)):
        grad, x, stored = make(triton_backend, 70, block=block)
        guarded = []
        for tensor in (grad, x):
            whole = tensor.new_full((len(tensor) + 200, tensor.shape[1]), float("nan"))
            whole[100:-100] = tensor
            guarded.append(whole[100:-100])
        assert torch.equal(call(*guarded, stored), call(grad, x, stored))


def test_strides(triton_backend: torch.device) -> None:
    grad, x, stored = make(triton_backend, 12)
    check(grad[1::2], x.t().contiguous().t()[:6], stored)
    check(grad[:, :1].expand(-1, grad.shape[1]), x, stored)


def test_cost_by_hand() -> None:
    from sparsebert.kernels.block_sparse_sddmm import cost, staged

    # One program to fill: no split.
    whole = cost(2048, 128, 256, (64, 64), 4, programs=1)
    assert whole.read == 2048 * (128 + 256) * 2 + 4 * (4 + 3) and whole.written == 2 * 4 * 4096
    assert whole.flops == 2 * 2048 * 4 * 4096 and whole.launches == 1
    # Two block rows of 128 columns: two programs, each four times.
    split = cost(2048, 128, 256, (64, 64), 4, programs=4)
    assert split.written - whole.written == 4 * 4 * 4 * 4096 and split.launches == 2
    assert split.read - whole.read == 4 * 4 * 4 * 4096 and split.flops - whole.flops == 4 * 4 * 4096
    assert staged(2048, 128, 256, (64, 64), 4) == 2 * 2048 * (64 + 128) * 2


def test_parts_of_the_tokens_cover_them() -> None:
    from sparsebert.kernels.block_sparse_sddmm import tiles

    for m in (1, 511, 512, 1025, 5000, 65536):
        for blocks in (1, 30, 144):
            for dtype in (torch.bfloat16, torch.float32):
                tile = tiles((64, 64), (3072, 768), blocks, m, dtype, 90, 132)
                assert tile.splits * tile.share(m) >= m and tile.share(m) % tile.depth == 0
                assert tile.splits == 1 or m // tile.splits >= 512


def test_wide_blocks_are_loaded_wide() -> None:
    """Only 16 bytes at a time are copied past the registers: three stages of both operands lie in shared memory."""
    script = (
        "from benchmarks.compiled import _compile\n"
        "from sparsebert.kernels.block_sparse_sddmm import specimens\n"
        "wide = [s for s in specimens() if s.label.startswith('bf16 128x128') and s.least == 90]\n"
        "print([_compile(s, 90)['shared'] for s in wide[:1]])"
    )
    # A process of its own: in this one the kernels may be the interpreter's.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.stdout.strip() == f"[{3 * (128 + 128) * 64 * 2}]", done.stderr
