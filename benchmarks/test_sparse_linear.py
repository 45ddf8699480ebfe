"""SparseLinear against the best dense layer, by every path there is: torch, oneDNN and OpenVINO, in fp32 and bf16.

Random weights pruned at random, random data, weights in cache. `--full` takes the whole grid of shapes, rows and
sparsities; without it a few cells of it are timed. A ratio is the candidate's time over `sparse`'s.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.linears import (
    ROWS,
    SHAPES,
    SPARSITIES,
    block_mask,
    check_close,
    dense_paths,
    pruned_linear,
    repeats,
)
from sparsebert import _load
from sparsebert.nn import SparseLinear
from sparsebert.training.hardware import has_native_bf16

# Format, dtype and the blocks that are pruned.
KINDS = {
    "unstructured fp32": ("unstructured", torch.float32, (1, 1)),
    "blocks:8x2 bf16": ("blocks:8x2", torch.bfloat16, (8, 2)),
}
SHORT = [((768, 768), rows, sparsity) for rows in (1, 128, 512) for sparsity in (0.5, 0.8, 0.9)]
FULL = [(shape, rows, sparsity) for shape in SHAPES for rows in ROWS for sparsity in SPARSITIES]


class OneDNN(nn.Module):
    """nn.Linear by oneDNN's product: the other dense layer that could have been kept."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def cells(config: pytest.Config) -> list[Any]:
    """The cells of the grid to time, with names."""
    chosen = FULL if config.getoption("--full") else SHORT
    return [pytest.param(*cell, id=f"{cell[0][0]}x{cell[0][1]}-{cell[1]}-{cell[2]}") for cell in chosen]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"shape", "rows", "sparsity"} <= set(metafunc.fixturenames):
        metafunc.parametrize(("shape", "rows", "sparsity"), cells(metafunc.config))


def case(shape: tuple[int, int], rows: int, sparsity: float, **more: Any) -> dict[str, Any]:
    return {**more, "out x in": f"{shape[0]}x{shape[1]}", "rows": rows, "sparsity": sparsity}


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_linear(bench: Any, kind: str, shape: tuple[int, int], rows: int, sparsity: float) -> None:
    format, dtype, block = KINDS[kind]
    if dtype == torch.bfloat16 and not has_native_bf16():
        pytest.skip("this CPU has no bf16 products")
    linear, x = pruned_linear(shape, block, sparsity), torch.randn(rows, shape[1])
    layer = SparseLinear.from_linear(linear, format=format, dtype=dtype)
    check_close(layer, linear, x)
    own = x.to(dtype)
    calls = {"sparse": lambda: layer(own), **dense_paths(linear, x)}
    with torch.inference_mode():
        timings = bench.interleave(calls, repeats(rows, bench.repeats))
    bench.row("sparse_linear", case(shape, rows, sparsity, kind=kind), timings, subject="sparse")


@pytest.mark.parametrize("kind", KINDS)
def test_auto(bench: Any, kind: str, shape: tuple[int, int], rows: int, sparsity: float) -> None:
    """`format="auto"` for this number of rows against the dense paths of the same dtype that it could have kept."""
    _, dtype, block = KINDS[kind]
    if dtype == torch.bfloat16 and not has_native_bf16():
        pytest.skip("this CPU has no bf16 products")
    linear, x = pruned_linear(shape, block, sparsity), torch.randn(rows, shape[1])
    layer = SparseLinear.from_linear(linear, dtype=dtype, rows=(rows,))
    check_close(layer, linear, x)
    own, dense = x.to(dtype), nn.Linear(shape[1], shape[0], dtype=dtype).requires_grad_(False)
    onednn = OneDNN(dense)
    calls = {"auto": lambda: layer(own), "nn.Linear": lambda: dense(own), "oneDNN": lambda: onednn(own)}
    with torch.inference_mode():
        timings = bench.interleave(calls, repeats(rows, bench.repeats))
    best = min(timings["nn.Linear"].median, timings["oneDNN"].median)
    named = case(shape, rows, sparsity, dtype=str(dtype).removeprefix("torch."), pruned=kind.split()[0])
    gain = {"best dense / auto": round(best / timings["auto"].median, 3)}
    bench.row("auto", {**named, "format": layer.format, **gain}, timings, subject="auto")


@pytest.mark.parametrize("format", ["unstructured", "blocks:8x1", "semi_structured:2:4"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_training(bench: Any, format: str, sparsity: float) -> None:
    """Forward, dX, dW and db under a fixed mask against nn.Linear's, 512 rows, fp32."""
    if format.startswith("semi") and sparsity != 0.5:
        pytest.skip("2:4 is half")
    shape = (768, 768)
    linear = pruned_linear(shape, (8, 1) if format.startswith("blocks") else (1, 1), sparsity)
    if format.startswith("semi"):
        linear.weight = nn.Parameter(torch.randn(shape) * _two_of_four(shape))
    layer = SparseLinear.from_linear(linear, format=format, trainable=True)
    dense = nn.Linear(shape[1], shape[0])
    x, grad = torch.randn(512, shape[1], requires_grad=True), torch.randn(512, shape[0])
    check_close(layer, linear, x.detach())
    before, exact = layer.weight.detach(), (grad.double().t() @ x.detach().double()) * layer.stored
    layer(x).backward(grad)
    torch.optim.SGD(layer.parameters(), lr=1.0).step()
    moved = before.double() - layer.weight.detach().double()
    assert (moved - exact).abs().max() <= 1e-5 * exact.abs().max()

    def step(module: nn.Module) -> None:
        module(x).backward(grad)
        x.grad = None
        module.zero_grad()

    timings = bench.interleave({"sparse": lambda: step(layer), "torch fp32": lambda: step(dense)})
    bench.row("sparse_training", case(shape, 512, sparsity, format=format), timings, subject="sparse")


def _two_of_four(shape: tuple[int, int]) -> torch.Tensor:
    order = torch.rand(shape[0], shape[1] // 4, 4).argsort(-1).argsort(-1)
    return (order < 2).view(shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [0.8, 0.9])
def test_instruction_sets(bench: Any, monkeypatch: pytest.MonkeyPatch, kind: str, sparsity: float) -> None:
    """The kernels that other machines get, on this one: 768x768, 512 rows."""
    format, dtype, block = KINDS[kind]
    linear, x = pruned_linear((768, 768), block, sparsity), torch.randn(512, 768, dtype=dtype)
    layer = SparseLinear.from_linear(linear, format=format, dtype=dtype)

    def under(isa: str) -> Any:
        def call() -> None:
            os.environ["SPARSEBERT_ISA"] = isa
            layer(x)

        return call

    host = _load.host()
    features = host.cpu_features() if host is not None else {}
    needs = {"avx512_bf16": "avx512_bf16", "avx512": "avx512dq", "avx2": "avx2"}
    sets = [*(isa for isa, feature in needs.items() if features.get(feature)), "generic"]
    for isa in sets:
        monkeypatch.setenv("SPARSEBERT_ISA", isa)
        check_close(layer, linear, x.float())
    with torch.inference_mode():
        calls = {isa: under(isa) for isa in sets}
        timings = bench.interleave(calls)
    named = {"kind": kind, "sparsity": sparsity}
    bench.row("instruction_sets", named, timings, subject=sets[0])


@pytest.mark.parametrize("rows", [16, 128, 512])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_dense_fallback(bench: Any, shape: tuple[int, int], rows: int) -> None:
    """What a layer that keeps its dense weight gets, fp32: SparseLinear's dense format against nn.Linear."""
    linear, x = nn.Linear(shape[1], shape[0]).requires_grad_(False), torch.randn(rows, shape[1])
    layer = SparseLinear.from_linear(linear, format="dense")
    check_close(layer, linear, x)
    onednn = OneDNN(linear)
    calls = {"sparsebert dense": lambda: layer(x), "nn.Linear": lambda: linear(x), "oneDNN fp32": lambda: onednn(x)}
    with torch.inference_mode():
        timings = bench.interleave(calls, repeats(rows, bench.repeats))
    bench.row("dense_fallback", {"out x in": f"{shape[0]}x{shape[1]}", "rows": rows}, timings, "sparsebert dense")


def test_stored_bytes(bench: Any) -> None:
    """Bytes of a stored 768x768 weight over those of the dense one in fp32."""
    rows = []
    for kind, (format, dtype, block) in KINDS.items():
        for sparsity in SPARSITIES:
            linear = nn.Linear(768, 768).requires_grad_(False)
            linear.weight.mul_(block_mask((768, 768), block, sparsity))
            layer = SparseLinear.from_linear(linear, format=format, dtype=dtype)
            bytes_ = layer.nbytes
            rows.append({"kind": kind, "sparsity": sparsity, "bytes": bytes_, "of dense fp32": bytes_ / 768**2 / 4})
    bench.tables["stored_bytes"] = [{**row, "of dense fp32": round(row["of dense fp32"], 3)} for row in rows]
