"""The cell of the fused block-sparse feed-forward block (G9)."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.bench import OURS, Bench, Check, Skip, own_cost
from benchmarks.gpu.inputs import linears, size_of
from benchmarks.gpu.rows import Target
from sparsebert.kernels._cost import Cost

__all__ = ["ffn"]


def ffn(
    bench: Bench,
    rows: int,
    sparsity: float,
    width: int,
    neurons: int,
    block: int,
    dtype: torch.dtype = torch.bfloat16,
    targets: tuple[Target, ...] = (),
) -> None:
    """up, GELU, down in one op against the same by two sparse linears, by cuBLAS and by torch.compile."""
    pattern = f"{block}x{block}"
    ups = linears(bench, f"blocks:{pattern}", pattern, (neurons, width), rows, sparsity, dtype)
    downs = linears(bench, f"blocks:{pattern}", pattern, (width, neurons), 1, sparsity, dtype)

    def make() -> Any:
        up, down = ups(), downs()
        return SimpleNamespace(x=up.x, up=up, down=down)

    def dense(x: Tensor, *weights: Tensor) -> Tensor:
        up, up_bias, down, down_bias = weights
        return F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias)

    def parts(s: Any, to: torch.dtype = dtype) -> list[Tensor]:
        return [t.to(to) for t in (s.x, s.up.weight, s.up.bias, s.down.weight, s.down.bias)]

    def hidden(s: Any) -> Tensor:
        return s.up.stored.linear(s.x, s.up.bias, "gelu")

    first = make()
    sides = (first.up.stored, first.down.stored)
    fused = bench.compiled(dense)
    tuned = bench.compiled(dense, "max-autotune-no-cudagraphs")
    stored, size = sum(side.nbytes for side in sides), size_of(dtype)
    flops = 2 * rows * sum(side.nnz for side in sides)
    sizes = {"shape": (width, neurons, width), "up": sides[0].values.shape, "down": sides[1].values.shape}
    chunk = _chunk(bench, rows, sizes, size)
    launched = own_cost("block_sparse_ffn", m=rows, **sizes, item=size, chunk=chunk)
    bench.compare(
        {"M": rows, "H": width, "neurons": neurons, "block": pattern, "sparsity": sparsity, "dtype": "bf16"},
        make,
        {
            OURS: call_of(first),
            "two sparse linears": lambda s: s.down.stored.linear(hidden(s), s.down.bias),
            "eager dense": lambda s: dense(*parts(s)),
            "compiled dense": lambda s: fused(*parts(s)),
            "compiled dense, max-autotune": lambda s: tuned(*parts(s)),
        },
        check=Check(lambda s: dense(*parts(s, torch.float64)), lambda s: dense(*parts(s))),
        limit=launched or Cost(rows * width * size + stored, rows * width * size, flops),
        limit_from="as launched" if launched else "",
        targets=targets,
        least=lambda s: s.up.stored.nbytes + s.down.stored.nbytes + rows * width * size,
        notes=[f"{rows} tokens go through {f'in chunks of {chunk}' if chunk else 'layer by layer'}"],
    )  # fmt: skip


def _chunk(bench: Bench, rows: int, sizes: dict[str, Any], item: int) -> int:
    """Tokens that the kernel takes at a time on this GPU, by its own plan; 0: a layer at a time."""
    try:
        from sparsebert.kernels.block_sparse_ffn import plan

        properties = torch.cuda.get_device_properties(bench.device) if bench.cuda else None
        cache = getattr(properties, "L2_cache_size", 50 << 20)
        arch = 10 * properties.major + properties.minor if properties else 90
        return int(plan(rows, *(tuple(size) for size in sizes.values()), item, arch, cache))
    except Exception:
        return 0


def call_of(first: Any) -> Any:
    """The op's call on a set, its arguments by the names of its parameters."""
    from sparsebert import ops

    op = getattr(ops, "block_sparse_ffn", None)
    if op is None:
        raise Skip("block_sparse_ffn: sparsebert.ops does not export it")
    names = inspect.signature(op).parameters

    def known(s: Any) -> dict[str, Any]:
        (n, inner), k = s.down.stored.shape, s.up.stored.shape[1]
        found: dict[str, Any] = {"x": s.x, "activation": "gelu", "shape": (n, inner, k)}
        for side, of in (("up", s.up), ("down", s.down)):
            stored = of.stored
            found |= {f"{side}_{name}": tensor for name, tensor in stored.tensors().items()}
            found |= {side: tuple(stored.tensors().values()), f"{side}_bias": of.bias, f"{side}_shape": stored.shape}
        return {name: value for name, value in found.items() if name in names}

    bound = known(first)
    lacking = [
        name for name, of in names.items() if of.default is inspect.Parameter.empty and name not in bound
    ]  # fmt: skip
    if lacking:
        raise Skip(f"block_sparse_ffn: this cell does not know what {', '.join(lacking)} should be")
    return lambda s: op(**known(s))
