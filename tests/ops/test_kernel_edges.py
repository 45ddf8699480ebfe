"""The linears over stored weights at their kernels' edges: sizes around vectors, panels and strips, odd numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ops.test_block_sparse_linear as blocks
import ops.test_dense_linear as dense
import ops.test_semi_structured_linear as semi_structured
import ops.test_unstructured_linear as unstructured
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.linear_cases import DTYPES, Case, by_torch, check_error
from ops.linears import LinearPromises
from torch import Tensor

from sparsebert.ops._backend import OPS
from sparsebert.ops._linear import ACTIVATIONS, activate

shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
LAYERS: dict[str, LinearPromises] = {
    "unstructured": unstructured.TestUnstructuredLinear(),
    "blocks": blocks.TestBlockSparseLinear(),
    "semi_structured": semi_structured.TestSemiStructuredLinear(),
    "dense": dense.TestDenseLinear(),
}
BLOCKS = (*blocks.TestBlockSparseLinear.options, (3, 5), (2, 1), (12, 2), (64, 2), (70, 3), (5, 2))
PATTERNS = (
    *semi_structured.TestSemiStructuredLinear.options,
    (3, 3),
    (7, 17),
    (1, 127),
    (1, 129),
    (100, 200),
    (9, 256),
)
ROWS = st.sampled_from([1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130])
SIZES = st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513])
cases = given(
    rows=ROWS,
    n=SIZES,
    k=SIZES,
    picked=st.integers(0, 99),
    density=st.sampled_from([0.01, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9999),
)


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> str:
    for op in (LAYERS[request.param].op, *LAYERS[request.param].gradients):
        reason = OPS[op].missing("cpu")
        if reason is not None:
            pytest.skip(f"{op}: {reason}")
    return str(request.param)


def make(layer: str, rows: int, n: int, k: int, picked: int, density: float, dtype: torch.dtype, seed: int) -> Case:
    """A case near the asked size: blocks and groups must fit into it a whole number of times."""
    option: Any = None
    if layer == "blocks":
        option = BLOCKS[picked % len(BLOCKS)]
        n, k = (-(-size // step) * step for size, step in zip((n, k), option, strict=True))
    if layer == "semi_structured":
        option = PATTERNS[picked % len(PATTERNS)]
        k = -(-k // option[1]) * option[1]
    return LAYERS[layer].make(rows, (n, k), density, option, dtype, seed)


def call(layer: str, case: Case, x: Tensor, activation: str = "none") -> Tensor:
    """Without a bias and without autograd."""
    with torch.no_grad():
        return LAYERS[layer].call(case.stored, x, case.values, None, activation=activation)


@shared
@cases
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_within_torchs_own_error(isa: str, layer: str, activation: str, **drawn: Any) -> None:
    LAYERS[layer].check_budget(make(layer, **drawn), activation)


@shared
@cases
def test_threads_and_repeats_give_the_same_bits(
    isa: str, layer: str, threads: Callable[[int], None], **drawn: Any
) -> None:
    case = make(layer, **drawn)
    results = []
    for number in (1, 2, 3, 1):
        threads(number)
        results.append((*LAYERS[layer].run(case), call(layer, case, case.x, "gelu")))
    for other in results[1:]:
        for i, (a, b) in enumerate(zip(results[0], other, strict=True)):
            assert torch.equal(a, b) or layer == "dense" or LAYERS[layer].is_torchs(i)


@shared
@cases
def test_what_is_not_finite_in_x_reaches_the_outputs_that_store_its_column(isa: str, layer: str, **drawn: Any) -> None:
    if layer == "dense":
        pytest.skip("stores every column")
    case = make(layer, **drawn)
    generator = torch.Generator().manual_seed(drawn["seed"])
    stored, weight = case.stored.stored(), case.weight.double()
    x = case.x.detach().clone()
    bad = torch.rand(x.shape, generator=generator) < 1.5 / x.shape[1]
    words = torch.tensor([float("nan"), float("inf"), -float("inf")])
    x[bad] = words[torch.randint(3, x.shape, generator=generator)].to(x.dtype)[bad]
    hit = (bad.float() @ stored.float().t()) > 0
    y, without = call(layer, case, x), call(layer, case, x.masked_fill(bad, 0))
    assert torch.equal(y[~hit], without[~hit])
    for row, column in hit.nonzero().tolist()[:50]:
        terms = x[row].double() * weight[column]
        torch.testing.assert_close(
            y[row, column].double(), terms[stored[column]].sum(), rtol=0.0, atol=0.0, equal_nan=True
        )


@shared
@cases
def test_very_large_and_very_small_numbers(isa: str, layer: str, **drawn: Any) -> None:
    case = make(layer, **{**drawn, "k": min(drawn["k"], 64)})
    for scale in (1e17, 1e-20):
        large = Case(case.stored, *(scale * leaf.detach() for leaf in case.leaves), case.grad, case.transposed)
        large.bias = torch.zeros_like(large.bias)
        exact, usual = (by_torch(large, dtype)[0] for dtype in (torch.float64, case.x.dtype))
        y = call(layer, large, large.x)
        if scale > 1:
            check_error(y, usual, exact, 2.0, by_torch(large, torch.float64, magnitudes=True)[0])
        else:
            # Instructions on bf16 take numbers below the smallest normal one for 0.
            assert (y.double() - exact).abs().max() <= case.stored.shape[1] * torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 40])
def test_activations_at_their_ends(isa: str, layer: str, rows: int, activation: str, dtype: torch.dtype) -> None:
    ends = [0.0, -0.0, 1e-40, 1e-30, 3.0, 3.9, 4.0, 5.5, 6.0, 8.9, 9.0, 9.1, 12.0, 100.0, 1e5, 1e10, 1e30]
    # What torch's libraries make of the last numbers is theirs: oneDNN's GELU overflows, and makes a NaN of infinity.
    ends += [] if layer == "dense" else [3e38, float("inf")]
    x = torch.tensor([[*ends, *(-end for end in ends), float("nan")]]).t().to(dtype)
    exact = activate(x.double(), activation)
    option = {"blocks": (1, 1), "semi_structured": (1, 1)}.get(layer)
    case = LAYERS[layer].make(1, (1, 1), 1.0, option, dtype)
    with torch.no_grad():
        case.values.fill_(1)
    if rows == 1:
        y = torch.cat([call(layer, case, row, activation) for row in x.split(1)])
    else:
        y = call(layer, case, torch.cat((x, x)), activation)[: len(x)]
    # A relative error of what torch's float32 has, and next to 0 an absolute one.
    wanted = exact.to(dtype).double()
    torch.testing.assert_close(y.double(), wanted, rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=1e-6, equal_nan=True)
    if activation == "tanh":
        assert y[~y.isnan()].abs().max() <= 1
