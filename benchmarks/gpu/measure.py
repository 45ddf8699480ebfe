"""Part `measure`: the denominators of performance.md §10, all of torch's own. Nothing here is ours."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.bench import Bench, Cell
from benchmarks.gpu.inputs import FFN, SQUARE, mask_of, product_cost
from sparsebert.kernels._cost import Cost

__all__ = ["ceiling", "cells", "sdpa_paths"]

SHAPES = (SQUARE, *FFN)
BF16 = torch.bfloat16


def cells(bench: Bench) -> list[Cell]:
    """The denominators, those that most others divide by first."""
    small = {"shape": (32, 16), "rows": 8}
    tiny = {"batch": 2, "heads": 2, "length": 16, "width": 16}
    found = [Cell("ceilings", _ceilings)]
    for rows in (4096, 16384, 1024, 128, 65536):
        found += [Cell("cuBLAS", _cublas, {"shape": shape, "rows": rows}, small) for shape in SHAPES]
    found += [
        Cell("2:4 of torch", _two_four, {"shape": shape, "rows": rows}, small)
        for rows in (4096, 16384, 1024, 128, 65536)
        for shape in SHAPES
    ]
    for length, width in ((128, 64), (512, 64), (1024, 64), (4096, 64), (512, 32), (512, 128), (4096, 128), (2048, 64)):
        sizes = {"batch": 16384 // length, "heads": 768 // width, "length": length, "width": width}
        found += [Cell("SDPA", _sdpa, {**sizes, "padded": padded}, tiny) for padded in (False, True)]
    found += [
        Cell("kl_div", _kl_div, {"rows": 16384, "classes": 30522}, {"rows": 8, "classes": 12}),
        *(Cell("top-k", _top_k, {"shape": shape}, {"shape": (8, 16)}) for shape in (SQUARE, FFN[0])),
        *(
            Cell("BSR of torch", _bsr, {"shape": FFN[0], "rows": rows, "sparsity": sparsity}, {**small, "block": 8})
            for rows in (4096, 16384)
            for sparsity in (0.75, 0.9)
        ),
    ]
    return found


def ceiling(bench: Bench) -> dict[str, float]:
    """Bytes a second of a large copy, read plus written, and FLOP a second of a large product of random bfloat16."""
    bytes_, n = (2 << 30, 8192) if bench.cuda else (1 << 16, 32)
    source = torch.randint(0, 1 << 30, (bytes_ // 4,), dtype=torch.int32, device=bench.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=bench.device, dtype=BF16) for _ in range(2))
    calls: dict[str, Callable[[Any], Any]] = {"copy": lambda _: target.copy_(source), "product": lambda _: a @ b}
    for call in calls.values():
        bench.clock.warm(call, [None])
    times = bench.clock.interleave(calls, [None], "gpu")
    return {
        "bytes_per_second": 2 * bytes_ / times["copy"].median,
        "flops_per_second": 2 * n**3 / times["product"].median,
    }


def _ceilings(bench: Bench) -> None:
    found = ceiling(bench)
    facts = {"copy, TB/s": found["bytes_per_second"] / 1e12, "product, TFLOP/s": found["flops_per_second"] / 1e12}
    bench.facts({"copy": "2 GiB", "product": "8192^3, bf16"}, facts)


def _rate(bench: Bench, case: dict[str, Any], cost: Cost, make: Any, calls: dict[str, Any]) -> None:
    """Rows of every candidate, cold and warm; the subject is torch's own path, the first."""
    for state in ("cold", "warm"):
        bench.compare(case, make, calls, state=state, limit=cost, subject=next(iter(calls)))


def _cublas(bench: Bench, shape: tuple[int, int], rows: int) -> None:
    (n, k), device = shape, bench.device

    def make() -> Any:
        return SimpleNamespace(
            x=torch.randn(rows, k, device=device, dtype=BF16),
            weight=torch.randn(n, k, device=device, dtype=BF16),
            grad=torch.randn(rows, n, device=device, dtype=BF16),
        )

    products = {
        "forward": lambda s: F.linear(s.x, s.weight),
        "dX": lambda s: s.grad @ s.weight,
        "dW": lambda s: s.grad.t() @ s.x,
    }
    for name, call in products.items():
        case = {"": name, "N x K": f"{n}x{k}", "M": rows, "dtype": "bf16"}
        _rate(bench, case, product_cost(rows, n, k, BF16), make, {"cuBLAS": call})


def two_four_paths(weight: Tensor, bias: Tensor | None = None, found: dict[int, int] | None = None) -> dict[str, Any]:
    """torch's own 2:4: the layer as it comes, and cuSPARSELt with the algorithm that a search finds.

    `found` keeps the algorithms by M, for several weights of one shape.
    """
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, to_sparse_semi_structured

    sparse = to_sparse_semi_structured(weight)
    packed = SparseSemiStructuredTensorCUSPARSELT.from_dense(weight).packed
    algorithms = {} if found is None else found

    def searched(x: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows not in algorithms:
            algorithms[rows] = int(torch._cslt_sparse_mm_search(packed, x.t()))
        return torch._cslt_sparse_mm(packed, x.t(), bias=bias, alg_id=algorithms[rows]).t()

    return {"torch 2:4": lambda x: F.linear(x, sparse, bias), "cuSPARSELt, searched": searched}


def _two_four(bench: Bench, shape: tuple[int, int], rows: int) -> None:
    (n, k), device = shape, bench.device
    weight = torch.randn(n, k, device=device, dtype=BF16) * mask_of("2:4", shape, 0.5, device)
    calls: dict[str, Any] = {"cuBLAS": lambda s: F.linear(s.x, weight)}
    paths: dict[str, Any] = {}

    def lazily(name: str) -> Any:
        def call(s: Any) -> Tensor:
            if not paths:
                paths.update(two_four_paths(weight))
            return paths[name](s.x)

        return call

    calls |= {name: lazily(name) for name in ("torch 2:4", "cuSPARSELt, searched")}
    make = lambda: SimpleNamespace(x=torch.randn(rows, k, device=device, dtype=BF16))  # noqa: E731
    case = {"N x K": f"{n}x{k}", "M": rows, "dtype": "bf16"}
    cost = product_cost(rows, n, k, BF16, stored=n * k * 9 // 8, kept=0.5)
    bench.compare(case, make, calls, limit=cost, limit_from="2:4", subject="cuBLAS")


def sdpa_paths(scale: float | None = None) -> dict[str, Any]:
    """torch's attention by each of its backends: calls `(q, k, v, mask)`."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }

    def by(backend: Any) -> Any:
        def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

        return call

    return {name: by(backend) for name, backend in backends.items()}


def _sdpa(bench: Bench, batch: int, heads: int, length: int, width: int, padded: bool) -> None:
    shape, device = (batch, heads, length, width), bench.device
    lengths = torch.linspace(0.2, 1.0, batch, device=device).mul(length).ceil()
    mask = (torch.arange(length, device=device) < lengths[:, None])[:, None, None, :] if padded else None

    def make() -> Any:
        q, k, v = (torch.randn(shape, device=device, dtype=BF16) for _ in range(3))
        return SimpleNamespace(q=q, k=k, v=v)

    def default(s: Any) -> Tensor:
        return F.scaled_dot_product_attention(s.q, s.k, s.v, attn_mask=mask)

    calls: dict[str, Any] = {"torch's choice": default}
    for name, path in sdpa_paths().items():
        if name != "math" or length <= 512:
            calls[name] = lambda s, path=path: path(s.q, s.k, s.v, mask)
    tokens = batch * length * heads * width
    cost = Cost(read=6 * tokens, written=2 * tokens, flops=4 * batch * heads * length * length * width)
    case = {"B": batch, "H": heads, "S": length, "d": width, "padding mask": padded}
    _rate(bench, case, cost, make, calls)


def _bsr(bench: Bench, shape: tuple[int, int], rows: int, sparsity: float, block: int = 64) -> None:
    (n, k), device = shape, bench.device
    weight = torch.randn(n, k, device=device, dtype=BF16) * mask_of(f"{block}x{block}", shape, sparsity, device)
    stored = weight.to_sparse_bsr((block, block))
    calls: dict[str, Any] = {"cuBLAS": lambda s: F.linear(s.x, weight), "torch BSR": lambda s: F.linear(s.x, stored)}
    make = lambda: SimpleNamespace(x=torch.randn(rows, k, device=device, dtype=BF16))  # noqa: E731
    case = {"N x K": f"{n}x{k}", "M": rows, "block": block, "sparsity": sparsity}
    cost = product_cost(rows, n, k, BF16, kept=1 - sparsity)
    bench.compare(case, make, calls, limit=cost, subject="cuBLAS")


def _top_k(bench: Bench, shape: tuple[int, int]) -> None:
    from benchmarks.steps import _TopK

    count = shape[0] * shape[1]
    make = lambda: SimpleNamespace(scores=torch.randn(shape, device=bench.device))  # noqa: E731
    calls: dict[str, Any] = {
        "sorting binariser": lambda s: _TopK.apply(s.scores, 0.5),
        "torch.sort": lambda s: torch.sort(s.scores.flatten()),
        "kthvalue": lambda s: torch.kthvalue(s.scores.flatten(), count // 2),
        "topk": lambda s: torch.topk(s.scores.flatten(), count // 2, sorted=False),
    }
    cost = Cost(read=4 * count, written=4 * count, flops=0)
    case = {"scores": f"{shape[0]}x{shape[1]}"}
    bench.compare(case, make, calls, state="warm", limit=cost, subject=next(iter(calls)))


def _kl_div(bench: Bench, rows: int, classes: int) -> None:
    device, temperature = bench.device, 2.0

    def make() -> Any:
        student, teacher = ((torch.randn(rows, classes, device=device) * 3).to(BF16) for _ in range(2))
        return SimpleNamespace(student=student.requires_grad_(), teacher=teacher)

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        log_student = F.log_softmax(student.float() / temperature, -1)
        return F.kl_div(log_student, F.softmax(teacher.float() / temperature, -1), reduction="batchmean") * 4

    compiled = bench.compiled(loss)
    calls: dict[str, Any] = {
        "eager": lambda s: torch.autograd.grad(loss(s.student, s.teacher), s.student),
        "compiled": lambda s: torch.autograd.grad(compiled(s.student, s.teacher), s.student),
    }
    cost = Cost(read=4 * rows * classes, written=2 * rows * classes, flops=0)
    case = {"rows": rows, "classes": classes, "dtype": "bf16", "": "forward and backward"}
    bench.compare(case, make, calls, state="warm", limit=cost, subject=next(iter(calls)))
