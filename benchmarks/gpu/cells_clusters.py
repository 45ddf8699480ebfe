"""The cell of the part `kernels` for blocks by clusters, whatever `block_sparse_linear` finds faster (G5 to G8)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.bench import OURS, Bench, Check
from benchmarks.gpu.cells_stored import NAMES, activated, dense_paths, least_read
from benchmarks.gpu.inputs import exact_linear, linears
from benchmarks.gpu.rows import Target
from sparsebert.kernels._cluster_costs import block_cluster_linear as cost
from sparsebert.kernels._cluster_costs import plan
from sparsebert.ops import block_cluster_linear

__all__ = ["clusters"]


def clusters(
    bench: Bench,
    shape: tuple[int, int],
    rows: int,
    sparsity: float,
    block: int = 64,
    activation: str = "none",
    dtype: torch.dtype = torch.bfloat16,
    targets: tuple[Target, ...] = (),
) -> None:
    """Blocks with many rows of x against dense paths; the cluster that was launched is among the facts."""
    (n, k), spelling = shape, f"blocks:{block}x{block}"
    make = linears(bench, spelling, f"{block}x{block}", shape, rows, sparsity, dtype)
    count = len(make().stored.values)
    down, across = plan(rows, n, k, block, count)

    def ours(s: Any) -> Tensor:
        index = (s.stored.columns, s.stored.row_starts)
        return block_cluster_linear(s.x, s.stored.values, *index, s.bias, shape=shape, activation=activation)

    bench.compare(
        {"N x K": f"{n}x{k}", "M": rows, "sparsity": sparsity, "stored": spelling, "dtype": NAMES[dtype],
         **({"": activation} if activation != "none" else {})},
        make,
        {OURS: ours, **dense_paths(bench, activation)},
        check=Check(
            lambda s: exact_linear(s, activation), lambda s: activated(F.linear(s.x, s.weight, s.bias), activation)
        ),
        limit=cost(rows, n, k, block, count),
        limit_from="as launched",
        targets=targets,
        facts={"tiles of rows to a cluster": down, "of tokens": across},
        least=least_read,
    )  # fmt: skip
