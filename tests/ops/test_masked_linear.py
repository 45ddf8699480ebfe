from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparsebert.errors import UserError
from sparsebert.ops import masked_linear, masked_weight, pack_bits
from sparsebert.ops._backend import OPS
from sparsebert.ops.bits import expand_grid

shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
Within = Callable[..., None]


@dataclass
class Case:
    """A layer, its mask on a grid, and a batch."""

    x: Tensor
    weight: Tensor
    mask: Tensor
    scores: Tensor
    bias: Tensor
    grad: Tensor
    dtype: torch.dtype

    @property
    def bits(self) -> Tensor:
        return pack_bits(self.mask)

    @property
    def masked(self) -> Tensor:
        return masked_weight(self.weight.detach(), self.bits, self.mask.shape, dtype=self.dtype)

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.weight, self.scores, self.bias

    def run(self, layer: Callable[..., Tensor] = masked_linear) -> tuple[Tensor, ...]:
        """`(y, dx, dweight, dscores, dbias)`."""
        y = layer(self.x, self.weight, self.masked, self.scores, self.bits, self.bias)
        return (y, *torch.autograd.grad(y, self.leaves, self.grad.to(y.dtype)))


def make(
    rows: int = 5,
    grid: tuple[int, int] = (3, 4),
    block: tuple[int, int] = (2, 2),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    wide: torch.dtype = torch.float32,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    n, k = grid[0] * block[0], grid[1] * block[1]
    leaves = [normal(rows, k, dtype=dtype), normal(n, k), normal(*grid), normal(n, dtype=dtype)]
    x, weight, scores, bias = (leaf.requires_grad_() for leaf in leaves)
    mask = torch.rand(grid, generator=generator) < 0.5
    return Case(x, weight, mask, scores, bias, normal(rows, n, dtype=dtype), dtype)


def by_autograd(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The promise by plain autograd: W times a real-valued mask, whose gradient is that of the scores."""
    x, weight, bias, grad = (t.detach().to(dtype) for t in (case.x, case.weight, case.bias, case.grad))
    if dtype != torch.float64:
        # torch's own way at this dtype: the product rounded to it, and its gradient
        x, bias, grad = x.to(case.dtype), bias.to(case.dtype), grad.to(case.dtype)
    mask = case.mask.to(weight.dtype).requires_grad_()
    x, weight, bias = x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    effective = expand_grid(mask, weight.shape) * weight
    # Every backend sees the masked weight rounded to the dtype computed in.
    rounded = effective + (case.masked.to(effective.dtype) - effective).detach()
    y = F.linear(x, rounded.to(x.dtype), bias)
    return (y, *torch.autograd.grad(y, (x, weight, mask, bias), grad))


@shared
@given(
    rows=st.sampled_from([0, 1, 2, 3, 4, 5, 17, 40]),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 9)),
    block=st.sampled_from([(1, 1), (1, 4), (8, 1), (3, 5), (40, 2), (2, 33)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 999),
)
def test_within_torchs_own_error(
    backend: str,
    within: Within,
    rows: int,
    grid: tuple[int, int],
    block: tuple[int, int],
    dtype: torch.dtype,
    seed: int,
) -> None:
    case = make(rows, grid, block, dtype, seed)
    results, exact, usual = case.run(), by_autograd(case, torch.float64), by_autograd(case, torch.float32)
    for i, (result, own, truth) in enumerate(zip(results, usual, exact, strict=True)):
        within(result.detach(), own.detach(), truth.detach(), 2.0 if i == 0 else 3.0, tiny=True)
    y, dx, dweight, dscores, dbias = results
    assert (y.dtype, dx.dtype, dbias.dtype) == (dtype, dtype, dtype)
    assert dweight.dtype == dscores.dtype == torch.float32
    pruned = ~expand_grid(case.mask, case.weight.shape)
    assert (dweight[pruned] == 0).all()


@pytest.mark.parametrize("rows", [128, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_a_layers_size(within: Within, rows: int, dtype: torch.dtype) -> None:
    case = make(rows, (12, 1), (16, 96), dtype)
    results, exact, usual = case.run(), by_autograd(case, torch.float64), by_autograd(case, torch.float32)
    for i, (result, own, truth) in enumerate(zip(results, usual, exact, strict=True)):
        within(result.detach(), own.detach(), truth.detach(), 2.0 if i == 0 else 3.0)


def test_in_float64_it_is_the_formula_and_passes_gradcheck() -> None:
    case = make(dtype=torch.float64, wide=torch.float64)
    for result, truth in zip(case.run(), by_autograd(case, torch.float64), strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-12, atol=1e-12)
    masked, bits = case.masked, case.bits

    def of_x_and_bias(x: Tensor, bias: Tensor) -> Tensor:
        return masked_linear(x, case.weight.detach(), masked, None, bits, bias, grid=case.mask.shape)

    assert torch.autograd.gradcheck(of_x_and_bias, (case.x, case.bias))

    def of_a_soft_mask(mask: Tensor) -> Tensor:
        soft = expand_grid(mask, case.weight.shape) * case.weight.detach()
        return F.linear(case.x.detach(), soft)

    # The scores' gradient is that of a multiplicative mask, here taken numerically.
    mask = case.mask.double().requires_grad_()
    assert torch.autograd.gradcheck(of_a_soft_mask, (mask,))
    (soft,) = torch.autograd.grad(of_a_soft_mask(mask), mask, case.grad)
    torch.testing.assert_close(case.run()[3], soft, rtol=1e-12, atol=1e-12)


def test_only_what_is_needed_is_computed(backend: str) -> None:
    case = make()
    full = dict(zip(("x", "weight", "scores", "bias"), case.run()[1:], strict=True))
    for name in full:
        for other, leaf in zip(full, case.leaves, strict=True):
            leaf.requires_grad_(other == name)
        bits = case.bits if name == "weight" else None
        y = masked_linear(case.x, case.weight, case.masked, case.scores, bits, case.bias)
        leaf = dict(zip(full, case.leaves, strict=True))[name]
        (gradient,) = torch.autograd.grad(y, leaf, case.grad)
        torch.testing.assert_close(gradient, full[name])


def test_pruned_weights_get_an_exact_zero_whatever_comes(backend: str) -> None:
    case = make(grid=(6, 8), block=(1, 1))
    case.grad[0, 0] = float("inf")
    case.grad[1, 1] = float("nan")
    dweight = case.run()[2]
    assert (dweight[~case.mask] == 0).all() and dweight[case.mask].isnan().any()


def test_a_nan_in_a_kept_weight_propagates_and_in_a_pruned_one_does_not(backend: str) -> None:
    case = make(grid=(6, 8), block=(1, 1))
    case.mask[0], case.mask[1] = True, False
    with torch.no_grad():
        case.weight[:2] = float("nan")
    y = masked_linear(case.x, case.weight, case.masked, case.scores, case.bits, case.bias)
    assert y[:, 0].isnan().all() and not y[:, 1:].isnan().any()


@pytest.mark.parametrize("shape", [(8,), (2, 8), (0, 8), (3, 0, 8), (2, 3, 4, 8), (1, 1, 8)])
def test_leading_dimensions(backend: str, shape: tuple[int, ...]) -> None:
    case = make()
    x = torch.randn(shape, requires_grad=True)
    y = masked_linear(x, case.weight, case.masked, case.scores, case.bits, case.bias)
    torch.testing.assert_close(y, F.linear(x, case.masked, case.bias))
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    torch.testing.assert_close(x.grad, case.masked.sum(0).expand(shape))


def test_strides_offsets_and_expanded_gradients(backend: str) -> None:
    case = make(rows=6)
    whole = torch.randn(4, 20, 8)
    for x in (whole.transpose(0, 1), whole[1:, 3:], torch.randn(20, 4, 8)[..., ::1].mT.contiguous().mT, whole[:, :1]):
        x = x.detach().requires_grad_()
        y = masked_linear(x, case.weight, case.masked, case.scores, case.bits, case.bias)
        torch.testing.assert_close(y, F.linear(x, case.masked, case.bias))
        # The gradient of a sum is one number with stride 0; a transposed one comes from attention.
        for grad in (torch.ones(()).expand(y.shape), torch.randn(y.mT.shape).mT):
            results = torch.autograd.grad(y, (x, case.scores), grad, retain_graph=True)
            rows, columns = grad.reshape(-1, 6), x.detach().reshape(-1, 8)
            torch.testing.assert_close(results[0], grad @ case.masked)
            dense = (rows.t() @ columns) * case.weight.detach()
            torch.testing.assert_close(results[1], dense.view(3, 2, 4, 2).sum((1, 3)))


@pytest.mark.parametrize("rows", [2, 40])
def test_autocast_does_not_change_the_dtype_computed_in(backend: str, rows: int) -> None:
    case = make(rows)
    plain = case.run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = case.run()
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


def test_x_is_cast_to_the_masked_weights_dtype(backend: str) -> None:
    case = make(rows=20)
    masked = case.masked.bfloat16()
    y = masked_linear(case.x, case.weight, masked, case.scores, case.bits, case.bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, F.linear(case.x.bfloat16(), masked, case.bias.bfloat16()))
    y.float().sum().backward()
    assert case.x.grad is not None and case.x.grad.dtype == torch.float32


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_without_gradients(backend: str, rows: int) -> None:
    case = make(rows)
    usual = F.linear(case.x, case.masked, case.bias).detach()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            y = masked_linear(case.x, case.weight, case.masked, case.scores, None, case.bias)
        assert not y.requires_grad
        torch.testing.assert_close(y, usual)


def test_compiled_gradients_equal_eager_ones(backend: str) -> None:
    case = make(rows=20)

    def layer(*arguments: Any) -> Tensor:
        return F.gelu(masked_linear(*arguments))

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    # Not bit for bit: a library's product may depend on where in memory its operands happen to lie.
    for eager, traced in zip(case.run(layer), case.run(compiled), strict=True):
        torch.testing.assert_close(eager, traced, rtol=1e-6, atol=1e-6)


def test_repeats_give_the_same_bits() -> None:
    case = make(64, (12, 8), (8, 8))
    first = case.run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, case.run(), strict=True))


def test_a_mask_changed_after_the_forward_is_noticed(backend: str) -> None:
    case = make()
    masked = case.masked
    y = masked_linear(case.x, case.weight, masked, case.scores, case.bits, case.bias)
    masked_weight(case.weight.detach(), case.bits, case.mask.shape, out=masked)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_derivatives_are_refused(backend: str) -> None:
    case = make()
    y = masked_linear(case.x, case.weight, case.masked, case.scores, case.bits, case.bias)
    with pytest.raises(NotImplementedError, match="second derivatives are not supported"):
        torch.autograd.grad(y.sum(), case.x, create_graph=True)


def test_the_weight_needs_bits() -> None:
    case = make()
    with pytest.raises(ValueError, match="bits: needed where weight requires a gradient"):
        masked_linear(case.x, case.weight, case.masked, case.scores)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 7)}, r"x: expected float \[\.\.\., 8\] to fit weight"),
        ({"x": torch.zeros(5, 8, dtype=torch.int64)}, r"x: expected float"),
        ({"x": torch.zeros(())}, r"x: expected float"),
        ({"weight": torch.zeros(48)}, r"weight: expected \[N, K\], got \[48\]"),
        ({"masked_weight": torch.zeros(6, 9)}, r"masked_weight: expected float \[6, 8\] like weight"),
        ({"scores": torch.zeros(4, 4)}, r"scores: \[4, 4\] does not divide"),
        ({"grid": (6, 8)}, r"grid: expected \[3, 4\] like scores, got \[6, 8\]"),
        ({"scores": None, "grid": (6, 3)}, r"grid: \[6, 3\] does not divide"),
        ({"bits": torch.zeros(9, dtype=torch.uint8)}, r"bits: expected uint8 \[2\] for 12 entries"),
        ({"bias": torch.zeros(5)}, r"bias: expected \[6\]"),
        ({"x": torch.zeros(5, 8, device="meta")}, "x: expected on cpu like weight, got meta"),
        ({"scores": torch.zeros(3, 4, device="meta")}, "scores: expected on cpu like weight, got meta"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    case = make()
    names = ("x", "weight", "masked_weight", "scores", "bits", "bias")
    values = (case.x, case.weight, case.masked, case.scores, case.bits, case.bias)
    with pytest.raises(ValueError, match=message):
        masked_linear(**{**dict(zip(names, values, strict=True)), **change})


def test_a_forced_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    # In its interpreter Triton would serve the CPU.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = make(dtype=torch.float64, wide=torch.float64)
    arguments = (case.x, case.weight, case.masked, case.scores, case.bits)
    for word, message in {
        "cpu": "masked_linear has no cpu kernel for these dtypes",
        "cuda": "which that backend does not serve",
        "triton": "which that backend does not serve",
        "gpu": "unknown backend in SPARSEBERT_BACKEND 'gpu'",
    }.items():
        monkeypatch.setenv("SPARSEBERT_BACKEND", word)
        with pytest.raises(UserError, match=message):
            masked_linear(*arguments)


def test_opcheck(backend: str) -> None:
    case = make(rows=20)
    forward, backward = OPS["masked_linear"], OPS["masked_linear_backward"]
    cpu, bits, masked, grid = torch.device("cpu"), case.bits, case.masked, [3, 4]
    torch.library.opcheck(forward.pick(cpu), (case.x, case.weight, masked, case.scores, bits, case.bias, grid))
    torch.library.opcheck(forward.pick(cpu), (case.x, case.weight.detach(), masked, None, None, None, grid))
    fixed = (case.grad, case.x.detach(), case.weight.detach(), masked)
    for needs in ((True, True, True), (True, False, False), (False, True, False)):
        torch.library.opcheck(backward.pick(cpu), (*fixed, bits, grid, *needs))
