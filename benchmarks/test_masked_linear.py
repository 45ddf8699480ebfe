"""A training step of one linear layer under a mask, forward and backward, against the dense layer of torch.

`linear` is nn.Linear in the same dtype (gradients of x, weight and bias). `masked` is the op with W·mask cached, as it
is between optimiser steps (gradients of x, scores and bias); `masked, new mask` finds the mask anew too, as once per
step. `eager` sorts the scores and multiplies in every forward, as mask-learning code does. Warm caches, random data.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsebert.ops import masked_linear, select_mask

SHAPES = ((768, 768), (3072, 768), (768, 3072), (384, 384), (1536, 384))


class Binarize(torch.autograd.Function):
    """Top-half mask by a full sort; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        order = torch.sort(scores.reshape(-1)).indices
        mask = torch.ones_like(scores)
        mask.view(-1)[order[: scores.numel() // 2]] = 0.0
        return mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [128, 512, 2048, 4096])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_masked_linear(bench: Any, full: bool, shape: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    if not full and (shape, rows) != ((768, 768), 512):
        pytest.skip("one of the cells of --full")
    n, k = shape
    x = torch.randn(rows, k, dtype=dtype, requires_grad=True)
    weight, scores = torch.randn(n, k), torch.randn(n, k, requires_grad=True)
    dense = weight.to(dtype, copy=True).requires_grad_()
    bias = torch.zeros(n, dtype=dtype, requires_grad=True)
    grad, cached = torch.randn(rows, n, dtype=dtype), torch.empty(n, k, dtype=dtype)
    select_mask([scores], n * k // 2, [weight], [cached])

    def linear() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.linear(x, dense, bias), (x, dense, bias), grad)

    def masked() -> tuple[Tensor, ...]:
        y = masked_linear(x, weight, cached, scores, None, bias)
        return torch.autograd.grad(y, (x, scores, bias), grad)

    def masked_anew() -> tuple[Tensor, ...]:
        select_mask([scores], n * k // 2, [weight], [cached])
        return masked()

    def eager() -> tuple[Tensor, ...]:
        product = (Binarize.apply(scores) * weight).to(dtype)
        return torch.autograd.grad(F.linear(x, product, bias), (x, scores, bias), grad)

    # No speed is reported on a wrong result.
    for ours, usual in zip(masked(), eager(), strict=True):
        torch.testing.assert_close(ours, usual, rtol=0.05, atol=0.05 * usual.abs().max().item())
    candidates = {"masked": masked, "masked, new mask": masked_anew, "linear": linear, "eager": eager}
    name = "fp32" if dtype == torch.float32 else "bf16"
    case = {"N x K": f"{n}x{k}", "M": rows, "dtype": name}
    bench.row("masked_linear", case, bench.interleave(candidates), "masked")
