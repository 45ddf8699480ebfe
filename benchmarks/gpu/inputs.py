"""Inputs of the cells: BERT's shapes, random weights with random masks, and what each format stores of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.bench import Bench, Skip
from sparsebert.errors import UserError
from sparsebert.formats import parse_format
from sparsebert.kernels._cost import Cost

__all__ = ["FFN", "LAYER", "SQUARE", "gradients", "linears", "mask_of", "product_cost", "size_of"]

SQUARE, FFN = (768, 768), ((3072, 768), (768, 3072))
LAYER = (*(SQUARE,) * 4, *FFN)
"""`(N, K)` of the linears of one layer of BERT-base."""


def mask_of(kind: str, shape: tuple[int, int], sparsity: float, device: torch.device) -> Tensor:
    """A random mask bool `[N, K]`, exactly as many places pruned as the sparsity says: "unstructured", "n:m", "RxC"."""
    n, k = shape
    if ":" in kind:
        kept, group = map(int, kind.split(":"))
        order = torch.rand(n, k // group, group, device=device).argsort(-1)
        return (order < kept).reshape(n, k)
    r, c = map(int, kind.split("x")) if "x" in kind else (1, 1)
    cells = (n // r) * (k // c)
    keep = torch.ones(cells, dtype=torch.bool, device=device)
    keep[torch.randperm(cells, device=device)[: round(sparsity * cells)]] = False
    return keep.view(n // r, k // c).repeat_interleave(r, 0).repeat_interleave(c, 1)


def linears(
    bench: Bench,
    spelling: str,
    pattern: str,
    shape: tuple[int, int],
    rows: int,
    sparsity: float,
    dtype: torch.dtype,
    train: bool = False,
) -> Callable[[], Any]:
    """Makes sets `(x, weight, bias, stored, transposed, grad)` of a pruned layer; the structure is one for all sets.

    Raises:
        Skip: there is no such format.
    """
    (n, k), device = shape, bench.device
    try:
        kind, options = parse_format(spelling)
    except UserError as error:
        raise Skip(f"format {spelling}: {error}") from error
    mask = mask_of(pattern, shape, sparsity, device)
    structure = kind.from_dense(torch.where(mask, torch.randn(n, k, device=device), 0.0).to(dtype), mask, **options)
    transposed = structure.transposed() if train else []

    def make() -> Any:
        values = (torch.randn(structure.values.shape, device=device) * (structure.values != 0) / k**0.5).to(dtype)
        stored = structure.replaced(values=values.requires_grad_(train))
        return SimpleNamespace(
            x=torch.randn(rows, k, device=device).to(dtype).requires_grad_(train),
            weight=stored.to_dense().detach().contiguous().requires_grad_(train),
            bias=(torch.randn(n, device=device) * 0.1).to(dtype).requires_grad_(train),
            grad=torch.randn(rows, n, device=device).to(dtype) if train else None,
            stored=stored,
            transposed=transposed,
        )

    return make


def exact_linear(s: Any, activation: str = "none") -> Tensor:
    """The layer in float64, of the same rounded operands."""
    y = F.linear(s.x.double(), s.weight.double(), None if s.bias is None else s.bias.double())
    if activation == "none":
        return y
    return F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


def gradients(output: Tensor, leaves: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """Of every leaf."""
    return torch.autograd.grad(output, leaves, grad)


def size_of(dtype: torch.dtype) -> int:
    """Bytes of an element."""
    return torch.empty((), dtype=dtype).element_size()


def product_cost(rows: int, n: int, k: int, dtype: torch.dtype, stored: int | None = None, kept: float = 1.0) -> Cost:
    """The least of a layer's product: x and the stored weight read once, y written once, the kept weights multiplied.

    Args:
        stored: bytes of the weight as it is stored; None: dense.
        kept: share of the multiplications that remain.
    """
    size = size_of(dtype)
    weight = n * k * size if stored is None else stored
    return Cost(read=rows * k * size + weight, written=rows * n * size, flops=round(2 * rows * n * k * kept))
