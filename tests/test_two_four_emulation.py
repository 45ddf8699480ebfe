"""The packed 2:4 kernels' bodies, run on the host: packing, shares of a cluster, descriptors, edges, the way to y."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsebert import _load
from sparsebert.formats import SemiStructured, TwoFour
from sparsebert.ops import packed_residue, semi_structured_pack
from sparsebert.ops._linear import ACTIVATIONS, linear_reference

NAN = float("nan")
shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)


@pytest.fixture(scope="module")
def host() -> ModuleType:
    module = _load.host()
    if module is None or not hasattr(module, "emulate_two_four_linear"):
        pytest.skip("the host module was not built")
    return module


def buffer(tensor: Tensor | None) -> Any:
    """The tensor's own memory; 16-bit floats as the words they are stored in."""
    if tensor is None:
        return None
    return (tensor.view(torch.int16) if tensor.is_floating_point() else tensor).numpy()


def stored_of(n: int, k: int, seed: int) -> SemiStructured:
    torch.manual_seed(seed)
    kept = torch.rand(n, k // 4, 4).argsort(2).view(n, k) < 2
    return SemiStructured.from_dense(torch.randn(n, k).bfloat16(), kept)


def packed_by(host: ModuleType, stored: SemiStructured) -> Tensor:
    (n, k), guard = stored.shape, 64
    size = -(-n // 128) * -(-k // 64) * 9216
    room = torch.full((size + 2 * guard,), 0xA5, dtype=torch.uint8)
    packed = room[guard:-guard].view(-(-n // 128), -(-k // 64), 9216)
    host.emulate_two_four_pack(buffer(stored.values), buffer(stored.positions), buffer(packed), [n, k])
    assert (room[:guard] == 0xA5).all() and (room[-guard:] == 0xA5).all()
    return packed


@shared
@given(
    n=st.sampled_from([1, 8, 127, 128, 130, 260]), k=st.sampled_from([4, 12, 64, 68, 132, 192]), seed=st.integers(0, 99)
)
def test_packed_as_the_definition_says(host: ModuleType, n: int, k: int, seed: int) -> None:
    stored = stored_of(n, k, seed)
    assert torch.equal(packed_by(host, stored), semi_structured_pack(stored.values, stored.positions))


@shared
@given(
    n=st.sampled_from([8, 136, 256, 384]),
    k=st.sampled_from([8, 64, 200, 1088]),
    m=st.sampled_from([1, 129, 260]),
    density=st.sampled_from([0.0, 0.05, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_what_does_not_fit_into_two_of_four(
    host: ModuleType, n: int, k: int, m: int, density: float, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, kept, x = torch.randn(n, k).bfloat16(), torch.rand(n, k) < density, torch.randn(m, k).bfloat16()
    stored = TwoFour.from_dense(weight, kept)
    residue, semi = packed_residue(stored.residue()), stored.semi_structured()
    y = torch.full((m, n), NAN, dtype=torch.bfloat16)
    host.emulate_two_four_linear(
        buffer(x), buffer(packed_by(host, semi)), None, buffer(y), [n, k], "none", [buffer(part) for part in residue],
        list(residue[2].shape[1:3]),
    )  # fmt: skip
    dense = torch.where(kept, weight, 0.0).double()
    exact, terms = x.double() @ dense.t(), x.double().abs() @ dense.abs().t()
    assert ((y.double() - exact).abs() <= exact.abs() / 256 + 1e-6 * (1 + terms)).all()


@shared
@given(
    n=st.sampled_from([8, 128, 136, 256, 384, 512, 1024]),
    k=st.sampled_from([8, 64, 72, 200, 320]),
    m=st.sampled_from([1, 5, 127, 129, 260, 1030]),
    activation=st.sampled_from(ACTIVATIONS),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_layer(host: ModuleType, n: int, k: int, m: int, activation: str, biased: bool, seed: int) -> None:
    stored = stored_of(n, k, seed)
    x, bias = torch.randn(m, k).bfloat16(), torch.randn(n).bfloat16() if biased else None
    guard = 64
    room = torch.full((m * n + 2 * guard,), NAN, dtype=torch.bfloat16)
    y = room[guard:-guard].view(m, n)
    packed = packed_by(host, stored)
    host.emulate_two_four_linear(buffer(x), buffer(packed), buffer(bias), buffer(y), [n, k], activation, [], [])
    dense = stored.to_dense().double()
    exact = linear_reference(x.double(), dense, None if bias is None else bias.double(), activation)
    terms = x.double().abs() @ dense.abs().t()
    assert ((y.double() - exact).abs() <= exact.abs() / 256 + 1e-6 * (1 + terms)).all()
    assert room[:guard].isnan().all() and room[-guard:].isnan().all()
