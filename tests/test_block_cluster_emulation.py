"""The body of block_cluster_linear, run on the host: tables, shares of a cluster, descriptors, the way to y."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsebert import _load
from sparsebert.formats import Blocks
from sparsebert.ops._linear import ACTIVATIONS, linear_reference


@pytest.fixture(scope="module")
def host() -> ModuleType:
    module = _load.host()
    if module is None or not hasattr(module, "emulate_block_cluster_linear"):
        pytest.skip("the host module was not built")
    return module


def buffer(tensor: Tensor | None) -> Any:
    """The tensor's own memory; 16-bit floats as the words they are stored in."""
    if tensor is None:
        return None
    return (tensor.view(torch.int16) if tensor.is_floating_point() else tensor).numpy()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(
    shape=st.sampled_from([(64, 64), (128, 192), (192, 64), (384, 128), (512, 192), (768, 64), (64, 320)]),
    size=st.sampled_from([64, 128]),
    m=st.sampled_from([1, 5, 129, 260, 1030]),
    density=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    activation=st.sampled_from(ACTIVATIONS),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_layer(
    host: ModuleType,
    shape: tuple[int, int],
    size: int,
    m: int,
    density: float,
    activation: str,
    biased: bool,
    seed: int,
) -> None:
    from sparsebert.kernels._cluster_costs import plan

    torch.manual_seed(seed)
    n, k = (-(-side // size) * size for side in shape)
    keep = (torch.rand(n // size, k // size) < density).repeat_interleave(size, 0).repeat_interleave(size, 1)
    stored = Blocks.from_dense((torch.randn(n, k) / 8).bfloat16(), keep, block=(size, size))
    x, bias = torch.randn(m, k).bfloat16(), torch.randn(n).bfloat16() if biased else None
    y = torch.full((m, n), torch.nan, dtype=torch.bfloat16)
    cluster = host.emulate_block_cluster_linear(
        buffer(x), buffer(stored.values), buffer(stored.columns), buffer(stored.row_starts), buffer(bias), buffer(y),
        [n, k], activation, size,
    )  # fmt: skip
    shift = None if bias is None else bias.double()
    exact = linear_reference(x.double(), stored.to_dense().double(), shift, activation)
    terms = x.double().abs() @ stored.to_dense().double().abs().t()
    assert ((y.double() - exact).abs() <= exact.abs() / 256 + 1e-5 * (1 + terms)).all()
    assert tuple(cluster) == plan(m, n, k, size, len(stored.values))


def test_what_clusters_fetch() -> None:
    pytest.importorskip("triton")
    from sparsebert.kernels._cluster_costs import block_cluster_linear, plan, traffic

    # BERT-base's down projection at 50 %: six tiles of rows, three to a cluster, so that x is fetched twice.
    blocks = 12 * 48 // 2
    assert plan(16384, 768, 3072, 64, blocks) == (3, 2)
    x, weight = 2 * 3072 * 256 * (1 - 0.5**6), blocks * 8192 / 2
    assert traffic(16384, 768, 3072, 64, blocks) == round((x + weight) * 128)
    cost = block_cluster_linear(16384, 768, 3072, 64, blocks)
    assert cost.flops == 16384 * 768 * 3072 and cost.written == 2 * 16384 * 768
    # Where the weight is the larger part, it is shared the most.
    assert plan(8192, 4096, 4096, 128, 256) == (1, 8)
