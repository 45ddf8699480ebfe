"""The cell of what stands between two linears: LayerNorm of a sum."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.bench import OURS, Bench, Check, own_cost
from benchmarks.gpu.inputs import size_of
from sparsebert.kernels._cost import Cost

__all__ = ["add_norm"]

EPS = 1e-12


def add_norm(bench: Bench, rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """`LayerNorm(x + residual)` in one pass, against torch's two kernels and what torch.compile makes of them."""
    from sparsebert.ops import add_layer_norm

    def make() -> Any:
        x, residual = (torch.randn(rows, width, device=bench.device).to(dtype) for _ in range(2))
        weight, bias = (torch.randn(width, device=bench.device).to(dtype) for _ in range(2))
        return SimpleNamespace(x=x, residual=residual, weight=weight, bias=bias)

    def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x + residual, weight.shape, weight, bias, EPS)

    def parts(s: Any, to: torch.dtype = dtype) -> list[Tensor]:
        return [t.to(to) for t in (s.x, s.residual, s.weight, s.bias)]

    fused = bench.compiled(plain)
    size = rows * width * size_of(dtype)
    launched = own_cost("add_layer_norm", rows=rows, width=width, bytes_each=size_of(dtype))
    bench.compare(
        {"M": rows, "H": width, "dtype": str(dtype).removeprefix("torch.")},
        make,
        {
            OURS: lambda s: add_layer_norm(s.x, s.residual, s.weight, s.bias, EPS),
            "add, F.layer_norm": lambda s: plain(*parts(s)),
            "compiled": lambda s: fused(*parts(s)),
        },
        check=Check(lambda s: plain(*parts(s, torch.float64)), lambda s: plain(*parts(s))),
        limit=launched or Cost(2 * size, size, 0),
        limit_from="as launched" if launched else "",
    )
