"""block_cluster_linear on a Hopper GPU; without one its body runs in the emulation."""

from __future__ import annotations

import pytest
import torch
from ops.linear_cases import check_error

from sparsebert import _load
from sparsebert.formats import Blocks
from sparsebert.ops import block_cluster_linear
from sparsebert.ops._linear import ACTIVATIONS, linear_reference

CUDA = torch.device("cuda")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="torch sees no Hopper GPU"
)


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = _load.missing("cuda")
    if reason is not None:
        pytest.skip(f"no compiled CUDA kernels: {reason}")
    monkeypatch.setenv("SPARSEBERT_BACKEND", "cuda")


def stored_of(n: int, k: int, size: int, density: float, dtype: torch.dtype) -> Blocks:
    keep = (torch.rand(n // size, k // size, device=CUDA) < density).repeat_interleave(size, 0)
    weight = (torch.randn(n, k, device=CUDA) / k**0.5).to(dtype)
    return Blocks.from_dense(weight, keep.repeat_interleave(size, 1), block=(size, size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("rows", [1, 129, 1030, 4096, 9830])
def test_the_layer(rows: int, size: int, dtype: torch.dtype) -> None:
    shapes = [(64, 64), (192, 64), (768, 768), (3072, 768), (768, 3072), (1024, 4096)]
    for number, (n, k) in enumerate([(max(n, size) // size * size, max(k, size)) for n, k in shapes]):
        stored = stored_of(n, k, size, (0.1, 0.25, 0.5, 0.0, 1.0)[(number + rows) % 5], dtype)
        x, bias = torch.randn(rows, k, device=CUDA).to(dtype), torch.randn(n, device=CUDA).to(dtype)
        activation, dense = ACTIVATIONS[(number + rows) % len(ACTIVATIONS)], stored.to_dense()
        index = (stored.columns, stored.row_starts)
        y = block_cluster_linear(x, stored.values, *index, bias, shape=(n, k), activation=activation)
        usual = linear_reference(x, dense, bias, activation)
        exact = linear_reference(x.double(), dense.double(), bias.double(), activation)
        check_error(y, usual, exact, 2, x.double().abs() @ dense.double().abs().t() + bias.double().abs())
        assert torch.equal(y, block_cluster_linear(x, stored.values, *index, bias, shape=(n, k), activation=activation))


def test_nothing_beyond_the_edges_is_used() -> None:
    stored, x = stored_of(192, 192, 64, 0.5, torch.bfloat16), torch.randn(200, 192, device=CUDA).bfloat16()
    expected = block_cluster_linear(x, stored.values, stored.columns, stored.row_starts, shape=(192, 192))
    for skip in (0, 1):  # An x that does not begin on 16 bytes is copied.
        room = torch.full((x.numel() + 4096 + skip,), torch.nan, device=CUDA, dtype=torch.bfloat16)
        guarded = room[2048 + skip :][: x.numel()].view_as(x).copy_(x)
        y = block_cluster_linear(guarded, stored.values, stored.columns, stored.row_starts, shape=(192, 192))
        assert torch.equal(y, expected)
