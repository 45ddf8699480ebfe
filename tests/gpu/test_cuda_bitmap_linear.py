"""The CUDA bitmap kernels on a GPU; without one their bodies run in the emulation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsebert import _load
from sparsebert.formats import Bitmap
from sparsebert.ops import bitmap_decode, bitmap_gather, bitmap_linear
from sparsebert.ops._linear import ACTIVATIONS, activate, linear_reference

CUDA = torch.device("cuda")
NAN = float("nan")
SHAPES = [(1, 1), (7, 9), (16, 64), (130, 65), (768, 768), (3072, 768), (768, 3072), (100, 1000), (9000, 64)]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = _load.missing("cuda")
    if reason is not None:
        pytest.skip(f"no compiled CUDA kernels: {reason}")
    monkeypatch.setenv("SPARSEBERT_BACKEND", "cuda")
    torch.manual_seed(0)


def stored_of(shape: tuple[int, int], density: float, dtype: torch.dtype) -> Bitmap:
    weight = torch.randn(shape, device=CUDA) / max(shape[1], 1) ** 0.5
    return Bitmap.from_dense(weight.to(dtype), torch.rand(shape, device=CUDA) < density)


def check_error(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    """At most twice torch's own error, both against float64."""
    exact = linear_reference(x.double(), weight.double(), None if bias is None else bias.double(), activation)
    own = activate(torch.nn.functional.linear(x, weight, bias), activation)
    largest = exact.abs().max()
    slack = (torch.finfo(y.dtype).eps + 1e-6) * largest
    assert (y.double() - exact).abs().max() <= 2 * (own.double() - exact).abs().max() + slack


@dtypes
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16, 31, 32, 64, 65, 200, 256, 257, 1000])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.2, 0.5, 1.0])
def test_the_layer(rows: int, density: float, dtype: torch.dtype) -> None:
    for number, (n, k) in enumerate(SHAPES):
        stored = stored_of((n, k), density, dtype)
        x = torch.randn(rows, k, device=CUDA).to(dtype)
        bias = torch.randn(n, device=CUDA).to(dtype) if number % 2 else None
        activation = ACTIVATIONS[(number + rows) % len(ACTIVATIONS)]
        y = bitmap_linear(x, stored.values, stored.bits, stored.starts, bias, shape=(n, k), activation=activation)
        check_error(y, x, stored.to_dense(), bias, activation)
        again = bitmap_linear(x, stored.values, stored.bits, stored.starts, bias, shape=(n, k), activation=activation)
        assert torch.equal(y, again)


@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_and_gather_are_exact(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for density in (0.0, 0.1, 1.0):
        stored = stored_of(shape, density, dtype)
        index = (stored.bits, stored.starts)
        dense = stored.to_dense()
        assert torch.equal(bitmap_decode(stored.values, *index, shape=shape), dense)
        assert torch.equal(bitmap_gather(dense, *index, nnz=stored.nnz), stored.values)
        off = torch.full((stored.nnz + 1,), NAN, dtype=dtype, device=CUDA)[1:].copy_(stored.values)
        assert torch.equal(bitmap_decode(off, *index, shape=shape), dense)


@dtypes
@pytest.mark.parametrize("rows", [5, 300])
def test_gradients(rows: int, dtype: torch.dtype) -> None:
    stored = stored_of((96, 200), 0.3, dtype)
    x = torch.randn(rows, 200, device=CUDA).to(dtype).requires_grad_()
    values = stored.values.clone().requires_grad_()
    bias = torch.randn(96, device=CUDA).to(dtype).requires_grad_()
    grad = torch.randn(rows, 96, device=CUDA).to(dtype)
    y = bitmap_linear(x, values, stored.bits, stored.starts, bias, shape=(96, 200))
    found = torch.autograd.grad(y, (x, values, bias), grad)
    leaves = [t.detach().double().requires_grad_() for t in (x, stored.to_dense(), bias)]
    exact = torch.autograd.grad(torch.nn.functional.linear(*leaves), leaves, grad.double())
    for one, other in zip((found[0], stored.replaced(values=found[1]).to_dense(), found[2]), exact, strict=True):
        wanted = torch.where(stored.stored(), other, 0.0) if other.shape == (96, 200) else other
        torch.testing.assert_close(one.double(), wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))


def test_strides_offsets_and_nan_beside_x() -> None:
    stored = stored_of((48, 96), 0.3, torch.bfloat16)
    index = (stored.bits, stored.starts)
    room = torch.full((20 * 96 + 24,), NAN, dtype=torch.bfloat16, device=CUDA)
    for skip in (0, 1, 8):
        x = room[8 + skip : 8 + skip + 20 * 96].copy_(torch.randn(20 * 96, device=CUDA)).view(20, 96)
        y = bitmap_linear(x, stored.values, *index, shape=(48, 96))
        check_error(y, x, stored.to_dense(), None, "none")
        room.fill_(NAN)
    wide = torch.randn(20, 192, device=CUDA).bfloat16()[:, ::2]
    check_error(bitmap_linear(wide, stored.values, *index, shape=(48, 96)), wide, stored.to_dense(), None, "none")
    # A row of x stays in its row of y.
    wide = wide.contiguous()
    wide[3] = NAN
    y = bitmap_linear(wide, stored.values, *index, shape=(48, 96))
    assert not y[[0, 1, 2, *range(4, 20)]].isnan().any()


@pytest.mark.parametrize("rows", [16, 600])
def test_a_captured_graph(rows: int) -> None:
    stored = stored_of((768, 3072), 0.2, torch.bfloat16)
    x = torch.randn(rows, 3072, device=CUDA).bfloat16()

    def layer() -> Tensor:
        return bitmap_linear(x, stored.values, stored.bits, stored.starts, shape=(768, 3072), activation="gelu")

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        layer()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = layer()
    for _ in range(2):
        x.normal_()
        graph.replay()
        with torch.no_grad():
            assert torch.equal(y, layer())


def test_it_compiles_into_one_graph() -> None:
    stored = stored_of((96, 200), 0.3, torch.bfloat16)

    def layer(x: Tensor) -> Tensor:
        return 2 * bitmap_linear(x, stored.values, stored.bits, stored.starts, shape=(96, 200), activation="gelu")

    x = torch.randn(20, 200, device=CUDA).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))
