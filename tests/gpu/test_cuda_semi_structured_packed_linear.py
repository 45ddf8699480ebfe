"""The packed 2:4 kernels on a Hopper GPU; without one their bodies run in the emulation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.linear_cases import check_error

from sparsebert import _load
from sparsebert.formats import SemiStructured, TwoFour
from sparsebert.ops import packed_residue, semi_structured_pack, semi_structured_packed_linear
from sparsebert.ops._linear import ACTIVATIONS, linear_reference
from sparsebert.ops.semi_structured_pack import semi_structured_pack_reference

CUDA = torch.device("cuda")
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="torch sees no Hopper GPU"
)
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = _load.missing("cuda")
    if reason is not None:
        pytest.skip(f"no compiled CUDA kernels: {reason}")
    monkeypatch.setenv("SPARSEBERT_BACKEND", "cuda")


def stored_of(n: int, k: int, dtype: torch.dtype) -> SemiStructured:
    kept = torch.rand(n, k // 4, 4, device=CUDA).argsort(2).view(n, k) < 2
    return SemiStructured.from_dense((torch.randn(n, k, device=CUDA) / k**0.5).to(dtype), kept)


@dtypes
def test_packed_as_the_definition_says(dtype: torch.dtype) -> None:
    for n, k in ((1, 4), (130, 68), (768, 768), (3072, 768), (260, 1028)):
        stored = stored_of(n, k, dtype)
        packed = semi_structured_pack(stored.values, stored.positions)
        assert torch.equal(packed, semi_structured_pack_reference(stored.values, stored.positions))


@dtypes
@pytest.mark.parametrize("rows", [1, 7, 128, 129, 260, 1000, 1024, 4096, 9830])
def test_the_layer(rows: int, dtype: torch.dtype) -> None:
    shapes = [(8, 8), (136, 72), (384, 64), (512, 200), (768, 768), (3072, 768), (768, 3072), (1024, 1024)]
    for number, (n, k) in enumerate(shapes):
        stored, x = stored_of(n, k, dtype), torch.randn(rows, k, device=CUDA).to(dtype)
        bias = torch.randn(n, device=CUDA).to(dtype) if number % 2 else None
        packed, dense = semi_structured_pack(stored.values, stored.positions), stored.to_dense()
        activation = ACTIVATIONS[(number + rows) % len(ACTIVATIONS)]
        y = semi_structured_packed_linear(x, packed, bias, shape=(n, k), activation=activation)
        usual = linear_reference(x, dense, bias, activation)
        exact = linear_reference(x.double(), dense.double(), None if bias is None else bias.double(), activation)
        scale = x.double().abs() @ dense.double().abs().t() + (0 if bias is None else bias.double().abs())
        check_error(y, usual, exact, 2, scale)
        assert torch.equal(y, semi_structured_packed_linear(x, packed, bias, shape=(n, k), activation=activation))


@dtypes
@pytest.mark.parametrize("density", [0.0, 0.05, 0.1, 0.4])
def test_with_what_does_not_fit_into_two_of_four(density: float, dtype: torch.dtype) -> None:
    for number, (n, k) in enumerate([(136, 72), (384, 200), (768, 768), (3072, 768), (768, 3072)]):
        weight = (torch.randn(n, k, device=CUDA) / k**0.5).to(dtype)
        weight = torch.where(torch.rand(n, k, device=CUDA) < density, weight, 0.0)
        stored, x = TwoFour.from_dense(weight), torch.randn(1000, k, device=CUDA).to(dtype)
        packed = semi_structured_pack(stored.semi_structured().values, stored.positions)
        residue = packed_residue(stored.residue())
        bias, activation = torch.randn(n, device=CUDA).to(dtype), ACTIVATIONS[number]
        options: dict[str, Any] = {"shape": (n, k), "activation": activation, "residue": residue}
        y = semi_structured_packed_linear(x, packed, bias, **options)
        usual = linear_reference(x, weight, bias, activation)
        exact = linear_reference(x.double(), weight.double(), bias.double(), activation)
        check_error(y, usual, exact, 2, x.double().abs() @ weight.double().abs().t() + bias.double().abs())
        assert torch.equal(y, semi_structured_packed_linear(x, packed, bias, **options))


def test_nothing_beyond_the_edges_is_used() -> None:
    stored, x = stored_of(136, 72, torch.bfloat16), torch.randn(200, 72, device=CUDA).bfloat16()
    packed = semi_structured_pack(stored.values, stored.positions)
    expected = semi_structured_packed_linear(x, packed, shape=(136, 72))
    for skip in (0, 1):  # An x that does not begin on 16 bytes is copied.
        room = torch.full((x.numel() + 4096 + skip,), torch.nan, device=CUDA, dtype=torch.bfloat16)
        guarded = room[2048 + skip : 2048 + skip + x.numel()].view(200, 72).copy_(x)
        assert torch.equal(semi_structured_packed_linear(guarded, packed, shape=(136, 72)), expected)


def test_a_graph_replays_it() -> None:
    stored, x = stored_of(768, 768, torch.bfloat16), torch.randn(512, 768, device=CUDA).bfloat16()
    packed = semi_structured_pack(stored.values, stored.positions)

    def call() -> torch.Tensor:
        return semi_structured_packed_linear(x, packed, shape=(768, 768), activation="gelu")

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, call())
