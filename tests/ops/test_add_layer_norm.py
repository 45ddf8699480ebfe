from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparsebert import _load
from sparsebert.ops import add_layer_norm
from sparsebert.ops._backend import OPS

shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
Within = Callable[..., None]
Tensors = tuple[Tensor, Tensor, Tensor, Tensor]

SHAPES = st.tuples(st.integers(0, 9), st.sampled_from([1, 2, 3, 15, 16, 17, 31, 64, 65, 100, 768]))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def make(rows: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0, offset: float = 0.0) -> Tensors:
    """x, residual, weight and bias."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) + offset).to(dtype)

    return normal(rows, width), normal(rows, width), normal(width), normal(width)


def plain(tensors: Tensors, eps: float = 1e-5) -> Tensor:
    """Torch's own."""
    x, residual, weight, bias = tensors
    return F.layer_norm(x + residual, weight.shape, weight, bias, eps)


def check(within: Within, tensors: Tensors, eps: float = 1e-5) -> None:
    result = add_layer_norm(*tensors, eps)
    assert result.dtype == tensors[0].dtype and result.is_contiguous()
    x, residual, weight, bias = (tensor.double() for tensor in tensors)
    # A few numbers far from 0 and close together magnify the rounding of x + residual, and torch's luck is another.
    factor = 2.0 if x.shape[-1] >= 16 else 40.0
    within(result, plain(tensors, eps), plain((x, residual, weight, bias), eps), factor, tiny=True)


@shared
@given(shape=SHAPES, dtype=DTYPES, offset=st.sampled_from([0.0, 5.0]), seed=st.integers(0, 999))
def test_within_torchs_own_error(
    backend: str, within: Within, shape: tuple[int, int], dtype: torch.dtype, offset: float, seed: int
) -> None:
    check(within, make(*shape, dtype, seed, offset))


@shared
@given(shape=SHAPES, dtype=DTYPES, seed=st.integers(0, 999))
def test_on_every_instruction_set(
    isa: str, within: Within, shape: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    check(within, make(*shape, dtype, seed))


def test_a_large_mean_does_not_drown_the_variance(backend: str, within: Within) -> None:
    check(within, make(4, 768, offset=300.0))


@pytest.mark.parametrize("shape", [(768,), (2, 3, 64), (0, 5, 8), (2, 0, 8)])
def test_any_number_of_dimensions(backend: str, shape: tuple[int, ...]) -> None:
    x, residual = torch.randn(shape), torch.randn(shape)
    weight, bias = torch.randn(shape[-1]), torch.randn(shape[-1])
    torch.testing.assert_close(add_layer_norm(x, residual, weight, bias, 1e-5), plain((x, residual, weight, bias)))


def test_non_contiguous_inputs(backend: str) -> None:
    x, residual, weight, bias = make(12, 40)
    views = (x[:, ::2], residual.view(6, 2, 40)[:, :, 20:].reshape(12, 20), weight[1::2], bias[:20])
    torch.testing.assert_close(add_layer_norm(*views, 1e-5), plain(views))
    sides = (x[:, :20], residual[:, 20:], *views[2:])
    torch.testing.assert_close(add_layer_norm(*sides, 1e-5), plain(sides))


def test_the_wider_of_two_dtypes_counts(backend: str) -> None:
    x, residual, weight, bias = make(3, 8)
    result = add_layer_norm(x.bfloat16(), residual, weight, bias, 1e-5)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, plain((x.bfloat16().float(), residual, weight, bias)))
    assert add_layer_norm(x.bfloat16(), residual.bfloat16(), weight, bias).dtype == torch.bfloat16


def test_rows_are_independent_and_a_nan_stays_in_its_own(backend: str) -> None:
    tensors = make(6, 33)
    whole = add_layer_norm(*tensors, 1e-5)
    assert torch.equal(whole[2:4], add_layer_norm(tensors[0][2:4], tensors[1][2:4], *tensors[2:], 1e-5))
    tensors[1][2, 32] = float("nan")
    poisoned = add_layer_norm(*tensors, 1e-5)
    assert poisoned[2].isnan().all() and torch.equal(poisoned[:2], whole[:2]) and torch.equal(poisoned[3:], whole[3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_nothing(threads: Callable[[int], None], dtype: torch.dtype) -> None:
    tensors = make(300, 200, dtype)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(add_layer_norm(*tensors))
    assert all(torch.equal(results[0], result) for result in results)


@shared
@given(
    shape=st.tuples(st.integers(0, 9), st.sampled_from([2, 3, 16, 33])),
    dtype=DTYPES,
    seed=st.integers(0, 999),
)
def test_gradients_within_torchs_own_error(
    backend: str, within: Within, shape: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    tensors, above = make(*shape, dtype, seed), make(*shape, dtype, seed + 1)[0]

    def gradients(run: Callable[..., Tensor], wide: torch.dtype) -> tuple[Tensor, ...]:
        leaves = tuple(tensor.to(wide, copy=True).requires_grad_() for tensor in tensors)
        return torch.autograd.grad(run(leaves), leaves, above.to(wide))

    # An eps so large that a pair of nearly equal numbers does not blow the gradients up.
    ours = gradients(lambda leaves: add_layer_norm(*leaves, 0.1), dtype)
    usual = gradients(lambda leaves: plain(leaves, 0.1), dtype)
    exact = gradients(lambda leaves: plain(leaves, 0.1), torch.float64)
    for result, own, truth in zip(ours, usual, exact, strict=True):
        assert result.dtype == dtype
        within(result, own, truth, 3.0, tiny=True)


def test_in_float64_it_is_the_formula_and_passes_gradcheck() -> None:
    leaves = tuple(tensor.requires_grad_() for tensor in make(3, 7, torch.float64))
    torch.testing.assert_close(add_layer_norm(*leaves, 1e-5), plain(leaves), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *x: add_layer_norm(*x, 1e-5), leaves)


def test_compiled_gradients_equal_eager_ones(backend: str) -> None:
    leaves = tuple(tensor.requires_grad_() for tensor in make(4, 20))

    def squared(*x: Tensor) -> Tensor:
        return add_layer_norm(*x).square()

    results = []
    for run in (squared, torch.compile(squared, fullgraph=True, backend="aot_eager")):
        out = run(*leaves)
        results.append((out, *torch.autograd.grad(out.sum(), leaves)))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(eager, traced, rtol=1e-6, atol=1e-6)


def test_opcheck(backend: str) -> None:
    leaves = tuple(tensor.requires_grad_() for tensor in make(4, 20))
    torch.library.opcheck(OPS["add_layer_norm"].pick(torch.device("cpu")), (*leaves, 1e-5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(8, 1)}, r"weight, bias: expected both \[H\], got \[8, 1\]"),
        ({"bias": torch.zeros(7)}, r"weight, bias: expected both \[H\], got \[8\] and \[7\]"),
        ({"x": torch.zeros(3, 7)}, r"x: expected \[..., 8\] to fit weight, got \[3, 7\]"),
        ({"residual": torch.zeros(4, 8)}, r"residual: expected \[3, 8\] like x, got \[4, 8\]"),
        ({"x": torch.zeros(3, 8, dtype=torch.int64)}, "x: expected a float dtype"),
        ({"bias": torch.zeros(8, device="meta")}, "bias: expected on cpu like x, got meta"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    names = ("x", "residual", "weight", "bias")
    with pytest.raises(ValueError, match=message):
        add_layer_norm(**{**dict(zip(names, make(3, 8), strict=True)), **change})


@pytest.mark.skipif(_load.missing("cpu") is not None, reason="no compiled CPU kernels")
@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, torch.zeros(3, 7)),
        (0, torch.zeros(3, 8, dtype=torch.float64)),
        (1, torch.zeros(2, 8)),
        (1, torch.zeros(3, 16)[:, ::2]),
        (1, torch.zeros(3, 8, dtype=torch.bfloat16)),
        (2, torch.zeros(8, 1)),
        (3, torch.zeros(7)),
    ],
)
def test_a_direct_call_reads_nothing_out_of_bounds(place: int, value: Tensor) -> None:
    arguments: list[Any] = [*make(3, 8), 1e-5]
    arguments[place] = value
    with pytest.raises(RuntimeError, match=("x", "residual", "weight", "bias")[place]):
        torch.ops.sparsebert.add_layer_norm(*arguments)
