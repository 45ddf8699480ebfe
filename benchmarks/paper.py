"""What the GPU kernels can reach at most, on paper: from their own tiles, against a dense path at the same ceilings.

python -m benchmarks.paper [--record]      needs no GPU; --record also writes benchmarks/results/paper.md

A bound is what binds longest of three: device memory (where inputs are warm, the second-level cache in its place),
matrix units, and what a kernel's programs fetch through that cache, whose rate nobody has measured here yet: the low
and the high value that are told of it both stand in the table. The dense path is given no such limit. A bound below its
target cannot be met as the kernel is built, unless the dense path falls short of its ceiling too, as a real one does.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsebert.formats import TwoFour
from sparsebert.kernels import (
    _bitmap_costs,
    _cluster_costs,
    block_sparse_ffn,
    block_sparse_linear,
    hidden_mse,
    linear_soft_cross_entropy,
    semi_structured_linear,
    soft_cross_entropy,
)
from sparsebert.kernels import block_sparse_attention as attention
from sparsebert.kernels._cost import CEILINGS, Ceiling, Cost
from sparsebert.ops import packed_residue

RESULTS = Path(__file__).resolve().parent / "results"
CACHE_RATES = (5.5e12, 8.0e12)
"""Bytes a second from the second-level cache of an H100, the least and the most that is told of it."""
UP, DOWN, SQUARE = (3072, 768), (768, 3072), (768, 768)


@dataclass(frozen=True)
class Case:
    """A kernel's call beside the dense one, and what is asked of it."""

    goal: str
    what: str
    ours: Cost
    dense: Cost
    target: float
    """How many times faster than dense; 0 where the goal is another kind of number."""
    staged: int = 0
    """Bytes that the programs fetch, mostly from the cache; 0 where nothing counts them."""
    warm: bool = False
    """Whether inputs and results lie in the cache."""
    share: float = 1.0
    """Of the matrix units' ceiling, what the best such kernels are known to reach."""

    def seconds(self, cache: float, device: str = "H100") -> tuple[float, float]:
        """The least that ours and the dense path take, with so many bytes a second from the cache."""
        whole = CEILINGS[device]
        ceiling = Ceiling(cache if self.warm else whole.bytes_per_second, self.share * whole.flops_per_second)
        return max(self.ours.seconds(ceiling), self.staged / cache), self.dense.seconds(ceiling)

    def bounds(self) -> tuple[float, ...]:
        """How many times faster than dense at most, by each of `CACHE_RATES`."""
        return tuple(dense / ours for ours, dense in map(self.seconds, CACHE_RATES))


def _dense(m: int, shape: tuple[int, int]) -> Cost:
    n, k = shape
    return Cost(2 * (m * k + n * k + n), 2 * m * n, 2 * m * n * k)


def _blocks(
    goal: str, m: int, shape: tuple[int, int], sparsity: float, target: float, size: int = 64, warm: bool = False
) -> Case:
    n, k = shape
    block, count = (size, size), round(n * k // size**2 * (1 - sparsity))
    what = f"{size}x{size} blocks, {n}x{k}, {sparsity:.0%}, {m:,} rows{', warm' if warm else ''}"
    triton, clusters = (
        Case(goal, f"{what}, {name}", cost, _dense(m, shape), target, staged, warm)
        for name, cost, staged in (
            ("Triton", block_sparse_linear.cost(m, n, k, block, count),
             block_sparse_linear.staged(m, n, k, block, count)),
            ("clusters", _cluster_costs.block_cluster_linear(m, n, k, size, count),
             _cluster_costs.traffic(m, n, k, size, count)),
        )
    )  # fmt: skip
    # The layer takes the faster one.
    return min(triton, clusters, key=lambda case: case.seconds(CACHE_RATES[0])[0])


def _two_four(m: int, shape: tuple[int, int], activation: str, target: float) -> Case:
    n, k = shape
    return Case(
        "G11", f"2:4 packed, {n}x{k}, {activation}, {m:,} rows",
        semi_structured_linear.cost(m, n, k, activation=activation, how="packed"), _dense(m, shape), target,
        semi_structured_linear.packed_traffic(m, n, k),
    )  # fmt: skip


def _residue(m: int, shape: tuple[int, int], sparsity: float) -> Case:
    n, k = shape
    torch.manual_seed(0)
    kept = torch.rand(n, k) < 1 - sparsity
    values = packed_residue(TwoFour.from_dense(kept.bfloat16()).residue())[2]
    ours = semi_structured_linear.cost(m, n, k, how="packed")
    ours += semi_structured_linear.residue_cost(m, n, values.shape[1], values.shape[2])
    what = f"2:4 and a residue, {n}x{k}, {sparsity:.0%}, {m:,} rows"
    return Case("G15", what, ours, _dense(m, shape), 1.15, semi_structured_linear.packed_traffic(m, n, k))


def _bitmap(rows: int, sparsity: float, target: float) -> Case:
    parts = [(shape, 12 * count) for shape, count in ((SQUARE, 4), (UP, 1), (DOWN, 1))]
    ours, dense = Cost(0, 0, 0, 0), Cost(0, 0, 0, 0)
    for (n, k), count in parts:
        for _ in range(count):
            ours += _bitmap_costs.bitmap_linear(n, k, round(n * k * (1 - sparsity)), rows)
            dense += _dense(rows, (n, k))
    return Case("G13", f"bitmap, BERT-base's 72 linears, {sparsity:.0%}, {rows} rows", ours, dense, target)


def _ffn(m: int, sparsity: float, target: float) -> Case:
    rows, width = UP
    blocks = round(rows * width // 64**2 * (1 - sparsity))
    layer = (blocks, 64, 64)
    shape = (width, rows, width)
    chunk = block_sparse_ffn.plan(m, shape, layer, layer, 2, 90, 50 << 20)
    if chunk:
        staged = block_sparse_ffn.staged_in_chunks(shape, layer, layer, m, chunk)
    else:
        staged = sum(block_sparse_ffn.staged(m, *size, (64, 64), blocks) for size in (UP, DOWN))
    return Case(
        "G9", f"fused feed-forward, 64x64 blocks, {sparsity:.0%}, {m:,} rows",
        block_sparse_ffn.cost(m, shape, layer, layer, chunk=chunk), _dense(m, UP) + _dense(m, DOWN), target, staged,
    )  # fmt: skip


def _attention(seq: int, sparsity: float, target: float, goal: str) -> Case:
    sizes, dim, block = (16384 // seq, 12, seq, seq), 64, (64, 64)
    all_blocks = sizes[0] * sizes[1] * (seq // 64) ** 2
    dense = attention.cost(sizes, dim, block, all_blocks)
    return Case(
        goal, f"block-sparse attention, length {seq}, {sparsity:.1%}",
        attention.cost(sizes, dim, block, round(all_blocks * (1 - sparsity))), dense, target, share=0.59,
    )  # fmt: skip


def cases() -> list[Case]:
    """The goals that a cost tells of, each in its own shapes."""
    tokens, classes = 16384, 30522
    logits, eager = soft_cross_entropy.cost(tokens, classes), Cost(100 * tokens * classes, 0, 0)
    states = hidden_mse.cost(13, tokens, 768, masked=False)
    head = linear_soft_cross_entropy.cost(tokens, classes, 768, 768)
    products = Cost(0, 0, 8 * tokens * classes * 768)
    return [
        _blocks("G5", 16384, UP, 0.75, 1.8), _blocks("G5", 16384, DOWN, 0.75, 1.8),
        _blocks("G6", 4096, UP, 0.75, 2.2, warm=True), _blocks("G6", 4096, UP, 0.9, 2.6, warm=True),
        _blocks("G7", 8192, (4096, 4096), 0.75, 3.0, 128),
        *(_blocks("G8", 16384, shape, 0.5, 1.25) for shape in (UP, DOWN, SQUARE)),
        _ffn(16384, 0.75, 2.4), _ffn(16384, 0.9, 3.2),
        _two_four(4096, UP, "gelu", 1.2), _two_four(16384, UP, "gelu", 1.35), _two_four(16384, DOWN, "none", 1.35),
        _two_four(16384, SQUARE, "none", 1.1),
        *(_bitmap(16, sparsity, target) for sparsity, target in ((0.5, 1.15), (0.7, 1.5), (0.8, 1.8), (0.9, 2.2))),
        *(_residue(16384, shape, sparsity) for shape in (UP, DOWN) for sparsity in (0.9, 0.95)),
        _attention(4096, 0.5, 1.6, "G17"), _attention(4096, 0.75, 3.0, "G17"), _attention(4096, 0.95, 10.0, "G17"),
        _attention(1024, 0.75, 2.3, "G18"),
        Case("G21", "soft cross-entropy with gradient, against 100 bytes a logit", logits, eager, 10.0),
        Case("G22", "linear head with it, against four of its products", head, products, 0.56),
        Case("G23", "hidden_mse, 13 layers, against bf16 eager", states, Cost(10 * 13 * tokens * 768, 0, 0), 1.5),
    ]  # fmt: skip


def table(found: Sequence[Case]) -> list[str]:
    """The cases as lines of Markdown."""
    lines = [
        "| goal | what | at least, cache at 5.5 TB/s | dense | so at most | cache at 8 TB/s | target | within reach |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in found:
        low, high = case.bounds()
        ours, dense = (1e6 * seconds for seconds in case.seconds(CACHE_RATES[0]))
        words = "yes" if low >= case.target else "if the cache is fast" if high >= case.target else "no"
        lines.append(
            f"| {case.goal} | {case.what} | {ours:.1f} µs | {dense:.1f} µs | {low:.2f}x | {high:.2f}x | "
            f"{case.target:g}x | {words} |"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, and records it where that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    parser.add_argument("--record", action="store_true", help="also write benchmarks/results/paper.md")
    given = parser.parse_args(argv)
    text = "\n".join(
        [
            "# The GPU kernels on paper",
            "",
            f"Made by `python -m benchmarks.paper --record` on {datetime.date.today():%Y-%m-%d}: bytes and FLOPs of "
            "each kernel as it is launched, from its own tiles, over an H100's measured ceilings (3.0 TB/s, 800 "
            "TFLOP/s in bf16), and the dense path over the same; attention of both kinds is given 470 TFLOP/s, the "
            "best that is told of it at 64 entries a head. No GPU has run any of it. What programs fetch from the "
            "second-level cache is counted for block-sparse and packed 2:4 layers alone, and no instructions are: what "
            "it takes to decode a bitmap is not in it, nor is that the blocks of a cluster wait for each other.",
            "",
            *table(cases()),
            "",
        ]
    )
    if given.record:
        (RESULTS / "paper.md").write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
