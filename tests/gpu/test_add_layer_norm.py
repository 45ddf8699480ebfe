"""LayerNorm of a sum: the Triton kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops import conftest as of_ops
from ops import test_add_layer_norm as on_cpu

from sparsebert.ops import add_layer_norm
from sparsebert.ops._backend import OPS

few = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Within = Callable[..., None]
within = of_ops.within


def make(device: torch.device, *settings: Any, **more: Any) -> on_cpu.Tensors:
    x, residual, weight, bias = (tensor.to(device) for tensor in on_cpu.make(*settings, **more))
    return x, residual, weight, bias


@few
@given(
    rows=st.integers(0, 9),
    width=st.sampled_from([1, 2, 3, 15, 16, 17, 31, 64, 65, 100, 312, 768]),
    offset=st.sampled_from([0.0, 5.0]),
    seed=st.integers(0, 999),
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_within_torchs_own_error(
    triton_backend: torch.device, within: Within, dtype: torch.dtype, rows: int, width: int, offset: float, seed: int
) -> None:
    on_cpu.check(within, make(triton_backend, rows, width, dtype, seed, offset))


@pytest.mark.parametrize(("rows", "width"), [(1026, 65), (1024, 200), (3, 2048), (2, 4097), (2, 8192)])
def test_every_tile(triton_backend: torch.device, within: Within, rows: int, width: int) -> None:
    on_cpu.check(within, make(triton_backend, rows, width))


def test_a_large_mean_does_not_drown_the_variance(triton_backend: torch.device, within: Within) -> None:
    on_cpu.check(within, make(triton_backend, 4, 768, offset=300.0))


@pytest.mark.parametrize("shape", [(768,), (2, 3, 64), (0, 5, 8), (2, 0, 8)])
def test_any_number_of_dimensions(triton_backend: torch.device, shape: tuple[int, ...]) -> None:
    tensors = tuple(torch.randn(size, device=triton_backend) for size in (shape, shape, shape[-1:], shape[-1:]))
    result = add_layer_norm(*tensors, 1e-5)
    torch.testing.assert_close(result, on_cpu.plain(tensors), rtol=1e-5, atol=1e-5)


def test_operands_that_are_views(triton_backend: torch.device) -> None:
    x, residual, weight, bias = make(triton_backend, 12, 40)
    views = (x[:, ::2], residual[:, 20:], weight[1::2], bias[:20])
    torch.testing.assert_close(add_layer_norm(*views, 1e-5), on_cpu.plain(views), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(5, 33), (1030, 24)])
def test_nothing_past_an_edge_is_read(triton_backend: torch.device, rows: int, width: int, dtype: torch.dtype) -> None:
    """Guards of NaN before and behind, and addresses that are no multiples of 16."""
    tensors = make(triton_backend, rows, width, dtype)

    def guarded(tensor: torch.Tensor) -> torch.Tensor:
        memory = torch.full((tensor.numel() + 131,), float("nan"), dtype=dtype, device=triton_backend)
        return memory[65 : 65 + tensor.numel()].view(tensor.shape).copy_(tensor)

    clean, beside = add_layer_norm(*tensors), add_layer_norm(*map(guarded, tensors))
    torch.testing.assert_close(clean, beside, rtol=1e-6, atol=1e-6)


def test_rows_are_independent_and_a_nan_stays_in_its_own(triton_backend: torch.device) -> None:
    tensors = make(triton_backend, 6, 33)
    whole = add_layer_norm(*tensors)
    tensors[1][2, 32] = float("nan")
    poisoned = add_layer_norm(*tensors)
    assert poisoned[2].isnan().all() and torch.equal(poisoned[:2], whole[:2]) and torch.equal(poisoned[3:], whole[3:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_every_time(triton_backend: torch.device, dtype: torch.dtype) -> None:
    tensors = make(triton_backend, 7, 100, dtype)
    assert torch.equal(add_layer_norm(*tensors), add_layer_norm(*tensors))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_within_torchs_own_error(triton_backend: torch.device, within: Within, dtype: torch.dtype) -> None:
    tensors, above = make(triton_backend, 5, 33, dtype), make(triton_backend, 5, 33, dtype, 1)[0]

    def gradients(run: Callable[..., torch.Tensor], wide: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = tuple(tensor.to(wide, copy=True).requires_grad_() for tensor in tensors)
        return torch.autograd.grad(run(leaves), leaves, above.to(wide))

    ours = gradients(lambda leaves: add_layer_norm(*leaves, 0.1), dtype)
    usual = gradients(lambda leaves: on_cpu.plain(leaves, 0.1), dtype)
    exact = gradients(lambda leaves: on_cpu.plain(leaves, 0.1), torch.float64)
    for result, own, truth in zip(ours, usual, exact, strict=True):
        within(result, own, truth, 3.0, tiny=True)


def test_opcheck(triton_backend: torch.device) -> None:
    body = OPS["add_layer_norm"].pick(triton_backend)
    assert body.namespace == "sparsebert_triton"
    leaves = [tensor.requires_grad_() for tensor in make(triton_backend, 4, 20)]
    torch.library.opcheck(body, (*leaves, 1e-5))


def test_compiles_in_one_piece(triton_backend: torch.device) -> None:
    tensors = make(triton_backend, 4, 20)
    traced = torch.compile(add_layer_norm, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(*tensors), add_layer_norm(*tensors))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_rows_too_wide_for_the_kernel_are_the_references() -> None:
    tensors = make(torch.device("cuda"), 3, 9000)
    torch.testing.assert_close(add_layer_norm(*tensors, 1e-5), on_cpu.plain(tensors), rtol=1e-5, atol=1e-5)


def test_tiles_hold_whole_rows() -> None:
    from sparsebert.kernels.add_layer_norm import tiles

    for rows in (1, 128, 1023, 1024, 100_000):
        for width in (1, 2, 127, 128, 312, 768, 1024, 1025, 4096, 8192):
            tile, block, warps = tiles(rows, width)
            assert block >= width and block & (block - 1) == 0 and tile & (tile - 1) == 0 and warps in (1, 2, 4, 8)
            # What a thread holds, in float32: enough to load at once, few enough for its registers.
            assert tile * block <= 32 * 32 * warps


def test_cost_is_what_one_counts_by_hand() -> None:
    from sparsebert.kernels.add_layer_norm import cost

    # Two operands read, one result written, weight and bias. A number: the sum, the mean, centred, 2 for the variance,
    # by the scale, by the weight, plus the bias.
    found = cost(16384, 768)
    size = 16384 * 768 * 2
    assert (found.read, found.written, found.launches) == (2 * size + 2 * 768 * 2, size, 1)
    assert found.flops == 8 * 16384 * 768
    assert cost(10, 16, 4).moved == 3 * 10 * 16 * 4 + 2 * 16 * 4
