"""Cells of the part `kernels`: masks from scores, W·mask, and a training step of one layer under a mask (G1 to G4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.bench import OURS, Bench, Check, Red, own_cost
from benchmarks.gpu.inputs import gradients, size_of
from benchmarks.gpu.rows import Target
from benchmarks.steps import _TopK
from sparsebert.kernels._cost import Cost
from sparsebert.ops import masked_linear, masked_weight, pack_bits, select_mask, unpack_bits
from sparsebert.ops.select_mask import select_mask_reference

__all__ = ["linear_step", "select", "weight"]

SPARSITY = 0.5

G1 = {4096: 1.10, 16384: 1.03}
G2 = {1024: 5.0, 4096: 2.2, 16384: 1.35}
G3 = {1024: 1.4, 4096: 1.12}
G3_COMPILED = {1024: 1.1, 4096: 1.1}


class Lean(torch.autograd.Function):
    """weight * mask by a bool mask; straight-through gradients of scores and weight: three small kernels in all."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, mask = ctx.saved_tensors
        return grad * mask, grad * weight, None


def linear_step(bench: Bench, shape: tuple[int, int], rows: int, dtype: torch.dtype, state: str = "cold") -> None:
    """Forward and backward of one layer under a learned mask: gradients of x, weight, scores and bias.

    `dense` is nn.Linear; `HF eager` keeps weight and scores in fp32 and sorts the scores in every forward, under
    autocast; `lean eager` multiplies a weight in the dtype of the products by a bool mask; `lean compiled` is that by
    torch.compile. Ours has W·mask cached, as it is between optimiser steps; with a `new mask` it is found anew; with
    `scores alone` the weight is fp32 and frozen, as Adapting by Pruning trains.
    """
    (n, k), device, kind = shape, bench.device, bench.device.type

    def make() -> Any:
        full, scores = torch.randn(n, k, device=device) / k**0.5, torch.randn(n, k, device=device)
        mask = scores > scores.median()
        weight = full.to(dtype)
        return SimpleNamespace(
            x=torch.randn(rows, k, device=device).to(dtype).requires_grad_(),
            weight=weight.clone().requires_grad_(),
            scores=scores.requires_grad_(),
            mask=mask,
            bits=pack_bits(mask),
            masked=weight * mask,
            frozen=full.clone(),
            full=full.requires_grad_(),
            lean_scores=torch.randn(n, k, device=device).to(dtype).requires_grad_(),
            bias=torch.zeros(n, dtype=dtype, device=device).requires_grad_(),
            grad=torch.randn(rows, n, device=device).to(dtype),
        )

    def ours(s: Any) -> tuple[Tensor, ...]:
        y = masked_linear(s.x, s.weight, s.masked, s.scores, s.bits, s.bias)
        return (y, *gradients(y, (s.x, s.weight, s.scores, s.bias), s.grad))

    def alone(s: Any) -> tuple[Tensor, ...]:
        y = masked_linear(s.x, s.frozen, s.masked, s.scores, None, s.bias)
        return (y, *gradients(y, (s.x, s.scores, s.bias), s.grad))

    def anew(s: Any) -> tuple[Tensor, ...]:
        select_mask([s.scores.detach()], n * k // 2, [s.weight.detach()], [s.masked])
        return ours(s)

    def dense(s: Any) -> tuple[Tensor, ...]:
        y = F.linear(s.x, s.weight, s.bias)
        return (y, *gradients(y, (s.x, s.weight, s.bias), s.grad))

    def hugging(s: Any) -> tuple[Tensor, ...]:
        with torch.autocast(kind, dtype=dtype, enabled=dtype != torch.float32):
            y = F.linear(s.x, s.full * _TopK.apply(s.scores, SPARSITY), s.bias)
        return (y, *gradients(y, (s.x, s.full, s.scores, s.bias), s.grad))

    def product(x: Tensor, weight: Tensor, scores: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, Lean.apply(weight, scores, mask), bias)

    def lean(layer: Callable[..., Tensor]) -> Callable[[Any], tuple[Tensor, ...]]:
        def call(s: Any) -> tuple[Tensor, ...]:
            y = layer(s.x, s.weight, s.lean_scores, s.mask, s.bias)
            return (y, *gradients(y, (s.x, s.weight, s.lean_scores, s.bias), s.grad))

        return call

    def by_hand(to: torch.dtype) -> Callable[[Any], tuple[Tensor, ...]]:
        def call(s: Any) -> tuple[Tensor, ...]:
            x, grad, masked = s.x.detach().to(to), s.grad.to(to), s.masked.to(to)
            y, grad_w = F.linear(x, masked, s.bias.detach().to(to)), grad.t() @ x
            return y, grad @ masked, grad_w * s.mask, grad_w * s.weight.detach().to(to), grad.sum(0)

        return call

    targets = []
    if dtype != torch.float32 and rows in G2:
        targets.append(Target("G2", "faster", G2[rows], ("HF eager",)))
        if shape != (768, 768) and rows in G1:
            targets.append(Target("G1", "slower", G1[rows], ("dense",)))
        if rows in G3:
            targets.append(Target("G3", "faster", G3[rows], ("lean eager",)))
            targets.append(Target("G3", "faster", G3_COMPILED[rows], ("lean compiled",)))
    calls = {OURS: ours, "dense": dense, f"{OURS}, new mask": anew,
             f"{OURS}, scores alone": alone, "HF eager": hugging, "lean eager": lean(product)}  # fmt: skip
    calls["lean compiled"] = lean(bench.compiled(product))
    bench.compare(
        {"N x K": f"{n}x{k}", "M": rows, "dtype": _name(dtype), "": "forward and backward"},
        make,
        calls,
        state=state,
        check=Check(by_hand(torch.float64), by_hand(dtype), factor=3.0),
        limit=_step_cost(rows, n, k, size_of(dtype)),
        targets=targets,
        notes=bench.unserved(("masked_linear", "masked_linear_backward", "select_mask")),
    )


def _step_cost(rows: int, n: int, k: int, size: int) -> Cost:
    """Three products, each tensor read where it is used; beside dW the mask's bits, the weight and dS in fp32."""
    x, y, w = rows * k * size, rows * n * size, n * k
    forward = Cost(x + w * size, y, 2 * rows * n * k)
    grad_x = Cost(y + w * size, x, 2 * rows * n * k)
    grad_w = Cost(x + y + w * size + w // 8, w * (size + 4), 2 * rows * n * k)
    return forward + grad_x + grad_w


def select(bench: Bench, shapes: tuple[tuple[int, int], ...], dtype: torch.dtype) -> None:
    """Scores to bits and W·mask, all matrices ranked together, against sorting (G4), kthvalue and topk."""
    device = bench.device
    total = sum(n * k for n, k in shapes)
    pruned = total // 2

    def make() -> Any:
        return SimpleNamespace(
            scores=[torch.randn(shape, device=device) for shape in shapes],
            weights=[torch.randn(shape, device=device) for shape in shapes],
            out=[torch.empty(shape, device=device, dtype=dtype) for shape in shapes],
        )

    def write(s: Any, mask: Tensor) -> None:
        parts = mask.split([score.numel() for score in s.scores])
        for part, w, out in zip(parts, s.weights, s.out, strict=True):
            out.copy_(w * part.view(w.shape))

    def flat(s: Any) -> Tensor:
        return torch.cat([score.flatten() for score in s.scores]) if len(s.scores) > 1 else s.scores[0].flatten()

    def ours(s: Any) -> list[Tensor]:
        return select_mask(s.scores, pruned, s.weights, s.out)

    def by_sort(s: Any) -> None:
        write(s, _TopK.apply(flat(s), SPARSITY))

    def by_kthvalue(s: Any) -> None:
        scores = flat(s)
        write(s, scores > torch.kthvalue(scores, pruned).values)

    def by_topk(s: Any) -> None:
        scores = flat(s)
        mask = torch.zeros_like(scores)
        mask[torch.topk(scores, total - pruned, sorted=False).indices] = 1.0
        write(s, mask)

    _exactly_selected(make(), pruned, dtype)
    known = {"scores": total, "total": total, "n": total, "sizes": [n * k for n, k in shapes], "out_bytes": 2}
    launched = own_cost("_cuda_costs", "select_mask", **known)
    bench.compare(
        {"matrices": len(shapes), "scores": total, "W·mask": _name(dtype)},
        make,
        {OURS: ours, "sorting binariser": by_sort, "kthvalue": by_kthvalue, "topk": by_topk},
        limit=launched or Cost(8 * total, size_of(dtype) * total + total // 8, 0),
        limit_from="one pass" if launched is None else "",
        targets=[Target("G4", "faster", 8.0, ("sorting binariser",))],
        facts={"error": "bit for bit the reference's"},
    )


def _exactly_selected(s: Any, pruned: int, dtype: torch.dtype) -> None:
    """Raises Red unless bits and W·mask are the reference's, ties among the scores included."""
    s.scores = [(score * 64).round() / 64 for score in s.scores]
    for out in s.out:
        out.fill_(math.nan)
    bits = select_mask(s.scores, pruned, s.weights, s.out)
    wanted = [torch.empty_like(b) for b in bits]
    out = [torch.empty_like(o) for o in s.out]
    select_mask_reference(s.scores, pruned, s.weights, wanted, out)
    for place, pair in enumerate(zip(bits, wanted, strict=True)):
        if not torch.equal(*pair):
            wrong = (unpack_bits(pair[0], s.scores[place].shape) != unpack_bits(pair[1], s.scores[place].shape)).sum()
            raise Red(f"wrong result: {int(wrong)} bits of scores[{place}] are not the reference's")
    for place, (ours, theirs) in enumerate(zip(s.out, out, strict=True)):
        if not torch.equal(ours, theirs):
            raise Red(f"wrong result: out[{place}] is not where(kept, weight, 0) in {dtype}")


def weight(bench: Bench, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """where(kept, weight, 0) from bits, against torch's product with a bool mask."""
    device, (n, k) = bench.device, shape
    count = n * k

    def make() -> Any:
        return SimpleNamespace(
            weight=torch.randn(shape, device=device),
            bits=torch.randint(0, 256, ((count + 7) // 8,), dtype=torch.uint8, device=device),
            mask=torch.rand(shape, device=device) > 0.5,
            out=torch.empty(shape, device=device, dtype=dtype),
        )

    bench.compare(
        {"N x K": f"{n}x{k}", "W·mask": _name(dtype)},
        make,
        {
            OURS: lambda s: masked_weight(s.weight, s.bits, None, s.out),
            "torch": lambda s: s.out.copy_(s.weight * s.mask),
        },
        check=Check(lambda s: torch.where(unpack_bits(s.bits, shape), s.weight, 0.0).to(dtype), least=0.0, factor=0.0),
        limit=Cost(4 * count + count // 8, count * size_of(dtype), 0),
    )


def _name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}[dtype]
