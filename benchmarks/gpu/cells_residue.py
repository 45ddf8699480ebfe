"""The cell of the part `kernels` for unstructured weights as 2:4 and a residue (G15)."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.gpu.bench import OURS, Bench, Check
from benchmarks.gpu.cells_stored import NAMES, activated, dense_paths
from benchmarks.gpu.inputs import exact_linear, linears, size_of
from benchmarks.gpu.rows import Target
from sparsebert.formats import pack_two_four
from sparsebert.kernels.semi_structured_linear import cost, residue_cost

__all__ = ["residue"]


def residue(
    bench: Bench,
    shape: tuple[int, int],
    rows: int,
    sparsity: float,
    activation: str = "none",
    dtype: torch.dtype = torch.bfloat16,
    targets: tuple[Target, ...] = (),
) -> None:
    """An unstructured weight on the sparse matrix units, what does not fit into 2:4 included, against dense paths."""
    n, k = shape
    made = linears(bench, "unstructured", "unstructured", shape, rows, sparsity, dtype)

    def make() -> Any:
        s = made()
        s.packed = pack_two_four(s.weight)
        return s

    first = make().packed
    chunks, products = first.residue[2].shape[1:3]
    bench.compare(
        {"N x K": f"{n}x{k}", "M": rows, "sparsity": sparsity, "stored": "2:4 and a residue", "dtype": NAMES[dtype],
         **({"": activation} if activation != "none" else {})},
        make,
        {OURS: lambda s: s.packed.linear(s.x, s.bias, activation), **dense_paths(bench, activation)},
        check=Check(
            lambda s: exact_linear(s, activation), lambda s: activated(F.linear(s.x, s.weight, s.bias), activation)
        ),
        limit=cost(rows, n, k, activation=activation, how="packed") + residue_cost(rows, n, chunks, products),
        limit_from="as launched",
        targets=targets,
        facts={"bytes of dense": first.nbytes / (n * k * size_of(dtype))},
        least=lambda s: int(s.packed.nbytes + s.x.numel() * s.x.element_size()),
    )  # fmt: skip
