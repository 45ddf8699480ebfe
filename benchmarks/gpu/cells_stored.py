"""Cells of the part `kernels`: layers over stored weights, forward and backward, against dense paths (G5 to G16)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.bench import OURS, Bench, Check, own_cost
from benchmarks.gpu.inputs import LAYER, exact_linear, gradients, linears, mask_of, product_cost, size_of
from benchmarks.gpu.measure import two_four_paths
from benchmarks.gpu.rows import Target
from sparsebert import ops
from sparsebert.kernels._cost import Cost
from sparsebert.nn import SparseLinear
from sparsebert.ops import block_sparse_linear, block_sparse_sddmm
from sparsebert.ops._backend import OPS
from sparsebert.ops.semi_structured_pack import on_hopper

__all__ = ["backward", "chosen", "encoder", "layer", "least_read", "stored_bytes", "structured", "two_four"]

NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}


def layer(
    bench: Bench,
    spelling: str,
    pattern: str,
    shape: tuple[int, int],
    rows: int,
    sparsity: float,
    dtype: torch.dtype = torch.bfloat16,
    state: str = "cold",
    activation: str = "none",
    computed: float | None = None,
    targets: tuple[Target, ...] = (),
) -> None:
    """A stored layer's forward against cuBLAS, torch's BSR where there are blocks, torch.compile with an activation.

    Args:
        computed: share of the multiplications that the format is to do; None: those of the stored weights.
    """
    n, k = shape
    make = linears(bench, spelling, pattern, shape, rows, sparsity, dtype)
    first = make()
    calls: dict[str, Any] = {
        OURS: lambda s: s.stored.linear(s.x, s.bias, activation),
        **dense_paths(bench, activation),
    }
    if spelling.startswith("blocks"):
        side = tuple(map(int, spelling.partition(":")[2].split("x")))
        calls["torch BSR"] = torch_bsr(side, activation)  # type: ignore[arg-type]
    kept = first.stored.nnz / (n * k) if computed is None else computed
    launched, stored = stored_cost(spelling, first, rows, dtype), first.stored.nbytes
    bench.compare(
        {"N x K": f"{n}x{k}", "M": rows, "sparsity": sparsity, "stored": spelling, "dtype": NAMES[dtype],
         **({"": activation} if activation != "none" else {})},
        make,
        calls,
        state=state,
        check=Check(
            lambda s: exact_linear(s, activation), lambda s: activated(F.linear(s.x, s.weight, s.bias), activation)
        ),
        limit=launched or product_cost(rows, n, k, dtype, stored, kept),
        limit_from="as launched" if launched else "",
        targets=targets,
        facts={"bytes of dense": stored / (n * k * size_of(dtype))},
        least=least_read,
    )  # fmt: skip


def torch_bsr(block: tuple[int, int], activation: str) -> Callable[[Any], Tensor]:
    """torch's own block-sparse layer; a set's weight is converted at its first call: that may fail."""

    def call(s: Any) -> Tensor:
        if not hasattr(s, "bsr"):
            s.bsr = s.weight.to_sparse_bsr(block)
        return activated(F.linear(s.x, s.bsr, s.bias), activation)

    return call


def dense_paths(bench: Bench, activation: str) -> dict[str, Callable[[Any], Tensor]]:
    """cuBLAS with the activation after it, fused by torch.compile, and in cuBLASLt's epilogue where it has it."""
    if activation == "none":
        return {"cuBLAS": lambda s: F.linear(s.x, s.weight, s.bias)}
    fused = bench.compiled(lambda x, w, b: activated(F.linear(x, w, b), activation))
    calls: dict[str, Callable[[Any], Tensor]] = {
        "cuBLAS": lambda s: activated(F.linear(s.x, s.weight, s.bias), activation),
        "compiled": lambda s: fused(s.x, s.weight, s.bias),
    }
    if activation in ("relu", "gelu_tanh"):
        gelu = activation == "gelu_tanh"
        calls["cuBLASLt"] = lambda s: torch.ops.aten._addmm_activation(s.bias, s.x, s.weight.t(), use_gelu=gelu)
    return calls


def activated(y: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return y
    return F.gelu(y, approximate="tanh") if activation == "gelu_tanh" else getattr(F, activation)(y)


def least_read(s: Any) -> int:
    """Bytes that the stored layer's forward reads of a set: the dense ones read more."""
    return int(s.stored.nbytes + s.x.numel() * s.x.element_size())


def stored_cost(spelling: str, first: Any, rows: int, dtype: torch.dtype) -> Cost | None:
    """What the kernel's own `cost` says of a call, by the names that it has for these numbers."""
    (n, k), item = first.stored.shape, size_of(dtype)
    known: dict[str, Any] = {"m": rows, "n": n, "k": k, "item": item, "nnz": first.stored.nnz, "bias": True}
    known |= {"stored": first.stored.nnz, "nbytes": first.stored.nbytes, "density": 1 - first.stored.sparsity}
    kind = spelling.partition(":")[0]
    if kind == "blocks":
        known |= {"block": tuple(first.stored.block), "blocks": len(first.stored.values)}
    op = {"blocks": "block_sparse_linear", "semi_structured": "semi_structured_linear", "bitmap": "bitmap_linear"}
    return own_cost(op[kind], **known) if kind in op else None


def backward(
    bench: Bench, block: int, shape: tuple[int, int], rows: int, sparsity: float, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Forward, dX and dW of block-sparse apart, each against its dense product (G10), then a whole step."""
    (n, k), spelling = shape, f"blocks:{block}x{block}"
    make = linears(bench, spelling, f"{block}x{block}", shape, rows, sparsity, dtype, train=True)
    sets = bench.sets(make, "cold", least_read)
    for s in sets:
        permutation, s.columns, s.row_starts = s.transposed
        s.turned = s.stored.values.detach()[permutation].transpose(1, 2).contiguous()
    first = sets[0]
    kept, stored = first.stored.nnz / (n * k), first.stored.nbytes
    case = {"N x K": f"{n}x{k}", "M": rows, "sparsity": sparsity, "stored": spelling, "dtype": NAMES[dtype]}
    places = (first.stored.columns, first.stored.row_starts)

    def sampled(product: Tensor) -> Tensor:
        grid = product.reshape(n // block, block, k // block, block).transpose(1, 2)
        return grid[first.stored._places()]

    def forward(s: Any) -> Tensor:
        with torch.no_grad():
            return s.stored.linear(s.x, s.bias)

    def dense(s: Any) -> Tensor:
        with torch.no_grad():
            return F.linear(s.x, s.weight, s.bias)

    cost = product_cost(rows, n, k, dtype, stored, kept)
    row = bench.compare(
        {**case, "": "forward"}, sets, {OURS: forward, "cuBLAS": dense},
        check=Check(lambda s: exact_linear(s).detach(), dense), limit=cost,
    )  # fmt: skip
    bound = 0.85 * row["best"] if row and row["best"] else 0.0
    targets = [Target("G10", "faster", bound, ("cuBLAS",))] if bound else []
    bench.compare(
        {**case, "": "dX"},
        sets,
        {
            OURS: lambda s: block_sparse_linear(s.grad, s.turned, s.columns, s.row_starts, shape=(k, n)),
            "cuBLAS": lambda s: s.grad @ s.weight.detach(),
        },
        check=Check(lambda s: s.grad.double() @ s.weight.detach().double(), lambda s: s.grad @ s.weight.detach(), 3.0),
        limit=product_cost(rows, k, n, dtype, stored, kept),
        targets=targets,
    )
    bench.compare(
        {**case, "": "dW"},
        sets,
        {
            OURS: lambda s: block_sparse_sddmm(s.grad, s.x.detach(), *places, (block, block)),
            "cuBLAS": lambda s: s.grad.t() @ s.x.detach(),
        },
        check=Check(
            lambda s: sampled(s.grad.double().t() @ s.x.detach().double()),
            lambda s: sampled(s.grad.t() @ s.x.detach()), 3.0,
        ),
        limit=own_cost("block_sparse_sddmm", m=rows, n=n, k=k, block=(block, block), blocks=len(first.stored.values))
        or Cost((n + k) * rows * size_of(dtype), stored, round(2 * rows * n * k * kept)),
        targets=targets,
    )  # fmt: skip
    step(bench, sets, {**case, "": "forward and backward"})


def step(bench: Bench, sets: list[Any], case: Mapping[str, Any], activation: str = "none") -> None:
    """A training step of a stored layer against the dense one: gradients of x, weight and bias."""

    def ours(s: Any) -> tuple[Tensor, ...]:
        y = s.stored.linear(s.x, s.bias, activation, s.transposed)
        return gradients(y, (s.x, s.stored.values, s.bias), s.grad)

    def dense(s: Any) -> tuple[Tensor, ...]:
        y = activated(F.linear(s.x, s.weight, s.bias), activation)
        return gradients(y, (s.x, s.weight, s.bias), s.grad)

    bench.compare(case, sets, {OURS: ours, "dense": dense})


def two_four(
    bench: Bench,
    shape: tuple[int, int],
    rows: int,
    activation: str,
    dtype: torch.dtype = torch.bfloat16,
    targets: tuple[Target, ...] = (),
) -> None:
    """2:4 with bias and activation and a row-major result, against cuBLASLt and torch's own 2:4 (G11, G12)."""
    n, k = shape
    make = linears(bench, "semi_structured:2:4", "2:4", shape, rows, 0.5, dtype)
    first = make()
    found: dict[int, int] = {}

    def torchs(name: str) -> Callable[[Any], Tensor]:
        def call(s: Any) -> Tensor:
            if not hasattr(s, "paths"):
                s.paths = two_four_paths(s.weight, s.bias, found)
            return activated(s.paths[name](s.x), activation)

        return call

    def packed(s: Any) -> Tensor:
        if not hasattr(s, "packed"):
            s.packed = ops.semi_structured_pack(s.stored.values, s.stored.positions)
        return ops.semi_structured_packed_linear(s.x, s.packed, s.bias, shape=shape, activation=activation)

    calls: dict[str, Any] = {OURS: lambda s: s.stored.linear(s.x, s.bias, activation), **dense_paths(bench, activation)}
    calls |= {name: torchs(name) for name in ("torch 2:4", "cuSPARSELt, searched")}
    if first.x.is_cuda and on_hopper(first.x.device.index) and OPS["semi_structured_pack"].missing("cuda") is None:
        calls["our kernel, whichever is chosen"] = packed
    launched = stored_cost("semi_structured:2:4", first, rows, dtype)
    bench.compare(
        {"N x K": f"{n}x{k}", "M": rows, "dtype": NAMES[dtype], "": activation},
        make,
        calls,
        check=Check(
            lambda s: exact_linear(s, activation), lambda s: activated(F.linear(s.x, s.weight, s.bias), activation)
        ),
        limit=launched or product_cost(rows, n, k, dtype, first.stored.nbytes, 0.5),
        limit_from="as launched" if launched else "",
        targets=targets,
        least=least_read,
    )


def encoder(
    bench: Bench,
    spelling: str,
    pattern: str,
    rows: int,
    sparsity: float,
    layers: int = 12,
    shapes: tuple[tuple[int, int], ...] = LAYER,
    dtype: torch.dtype = torch.bfloat16,
    targets: tuple[Target, ...] = (),
) -> None:
    """All linears of a BERT-base encoder one after another, in one CUDA graph (G13).

    Dense they are more than the cache; stored they may fit, so that the graph goes over several encoders to be cold.
    """
    makes = [linears(bench, spelling, pattern, shape, rows, sparsity, dtype) for shape in shapes * layers]
    sets = bench.sets(lambda: [make() for make in makes], "cold", lambda held: sum(s.stored.nbytes for s in held))

    def all_of(call: Callable[[Any], Tensor]) -> Callable[[Any], list[Tensor]]:
        return lambda held: [call(s) for s in held]

    floor, held = Cost(0, 0, 0, 0), sets[0]
    for s in held:
        n, k = s.stored.shape
        floor += product_cost(rows, n, k, dtype, s.stored.nbytes, 1.0 if pattern == "unstructured" else 1 - sparsity)
    ours, dense = all_of(lambda s: s.stored.linear(s.x, s.bias)), all_of(lambda s: F.linear(s.x, s.weight, s.bias))
    bench.compare(
        {"linears": len(held), "M": rows, "sparsity": sparsity, "stored": spelling, "dtype": NAMES[dtype]},
        sets,
        {OURS: ours, "cuBLAS": dense},
        how="graph",
        check=Check(all_of(exact_linear), dense),
        limit=floor,
        targets=targets,
    )


def stored_bytes(bench: Bench, spelling: str, pattern: str, shape: tuple[int, int], sparsity: float) -> None:
    """Bytes of a stored weight as a share of the dense one's (G14)."""
    first = linears(bench, spelling, pattern, shape, 1, sparsity, torch.bfloat16)()
    share = first.stored.nbytes / (2 * shape[0] * shape[1])
    case = {"N x K": f"{shape[0]}x{shape[1]}", "sparsity": sparsity, "stored": spelling, "dtype": "bf16"}
    bench.facts(case, {"bytes of dense": share}, [Target("G14", "value", 0.28, key="bytes of dense")])


def chosen(bench: Bench, pattern: str, shape: tuple[int, int], rows: int, sparsity: float) -> None:
    """`SparseLinear` as `auto` chooses: never slower than dense, and safe in a CUDA graph."""
    n, k = shape
    mask = mask_of(pattern, shape, sparsity, bench.device)
    linear = torch.nn.Linear(k, n, device=bench.device, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.mul_(mask)
    sparse = SparseLinear.from_linear(linear, mask, rows=(rows,))
    make = lambda: SimpleNamespace(x=torch.randn(rows, k, device=bench.device, dtype=torch.bfloat16))  # noqa: E731
    bench.compare(
        {"N x K": f"{n}x{k}", "M": rows, "sparsity": sparsity, "pattern": pattern, "chosen": sparse.format},
        make,
        {OURS: lambda s: sparse(s.x), "dense": lambda s: linear(s.x)},
        check=Check(
            lambda s: F.linear(s.x.double(), linear.weight.double(), linear.bias.double()), lambda s: linear(s.x)
        ),
        targets=[Target("never slower", "faster", 0.97, ("dense",))],
        notes=[sparse.choice.reason] if sparse.choice else [],
        graph=True,
    )


def structured(bench: Bench, rows: int, heads: int, neurons: int, width: int = 768, whole: int = 12) -> None:
    """The linears, GELU and LayerNorms of a layer with fewer heads and neurons against the whole one (G16).

    The fact is the speed-up over the ratio of FLOPs.
    """
    device, size, wide = bench.device, width // whole, 4 * width

    def linears_of(heads: int, neurons: int) -> list[torch.nn.Module]:
        inner = heads * size
        shapes = [(width, inner)] * 3 + [(inner, width), (width, neurons), (neurons, width)]
        made = [torch.nn.Linear(k, n, device=device, dtype=torch.bfloat16) for k, n in shapes]
        return [*made, torch.nn.LayerNorm(width, device=device, dtype=torch.bfloat16)]

    def run(parts: list[Any]) -> Callable[[Any], Tensor]:
        def call(s: Any) -> Tensor:
            q, k, v, out, up, down, norm = parts
            with torch.no_grad():
                x = norm(out(q(s.x) + k(s.x) + v(s.x)) + s.x)
                return norm(down(F.gelu(up(x))) + x)

        return call

    def flops(heads: int, neurons: int) -> int:
        return 2 * rows * width * (4 * heads * size + 2 * neurons)

    ratio = flops(whole, wide) / flops(heads, neurons)
    make = lambda: SimpleNamespace(x=torch.randn(rows, width, device=device, dtype=torch.bfloat16))  # noqa: E731
    calls = {OURS: run(linears_of(heads, neurons)), "whole": run(linears_of(whole, wide))}
    bench.compare(
        {"M": rows, "heads": f"{heads} of {whole}", "neurons": f"{neurons} of {wide}", "dtype": "bf16"},
        make,
        calls,
        targets=[Target("G16", "faster", 0.9 * ratio, ("whole",))],
        facts={"ratio of FLOPs": ratio},
    )
