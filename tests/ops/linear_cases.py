"""A stored weight with a batch, what torch makes of it, and how close to that an op must come."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsebert.formats import Format
from sparsebert.ops._backend import OPS

DTYPES = [torch.float32, torch.bfloat16]


@dataclass
class Case:
    """A stored weight with the structure of its transpose, a batch and the gradient of the result."""

    stored: Format
    x: Tensor
    values: Tensor
    bias: Tensor
    grad: Tensor
    transposed: list[Tensor]

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.values, self.bias

    @property
    def weight(self) -> Tensor:
        return self.stored.replaced(values=self.values.detach()).to_dense()


def skip_without(request: pytest.FixtureRequest, *ops: str) -> None:
    """Skip what asks for compiled kernels of these ops where there are none."""
    names = request.fixturenames
    if "isa" in names or ("backend" in names and request.getfixturevalue("backend") == "cpu"):
        for op in ops:
            reason = OPS[op].missing("cpu")
            if reason is not None:
                pytest.skip(f"{op}: {reason}")


def pick_mask(shape: tuple[int, int], density: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) < density


def by_torch(case: Case, dtype: torch.dtype, magnitudes: bool = False) -> tuple[Tensor, ...]:
    """`(y, dx, dvalues, dbias)` by plain autograd over the dense weight; `magnitudes`: of |x|, |W|, |b|, |dY|."""
    x, values, bias, grad = (t.detach().to(dtype) for t in (*case.leaves, case.grad))
    if magnitudes:
        x, values, bias, grad = x.abs(), values.abs(), bias.abs(), grad.abs()
    x, values, bias = (leaf.requires_grad_() for leaf in (x, values, bias))
    y = F.linear(x, case.stored.replaced(values=values).to_dense(), bias)
    return (y.detach(), *torch.autograd.grad(y, (x, values, bias), grad))


def check_error(result: Tensor, usual: Tensor, exact: Tensor, factor: float, scale: Tensor | None) -> None:
    """Assert that a result is about as close to the exact one as torch's own.

    Among a handful of numbers torch's own error can be 0 by chance. Given `scale`, the sums of the terms' magnitudes,
    one rounding of the result is allowed too, and of those sums in float32.
    """
    assert result.dtype == usual.dtype and result.shape == exact.shape
    if exact.numel() == 0:
        return
    largest = exact.abs().max()
    error, allowed = (result.double() - exact).abs().max(), (usual.double() - exact).abs().max()
    slack = 1e-6 * largest
    if scale is not None:
        slack += torch.finfo(usual.dtype).eps * largest + torch.finfo(torch.float32).eps * scale.abs().max()
    assert error <= factor * allowed + slack, f"error {error}, torch's own {allowed}, slack {slack}"
