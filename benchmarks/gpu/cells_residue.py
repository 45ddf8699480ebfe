"""The cell of the part `kernels` for unstructured weights as 2:4 and a residue (G15)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.bench import OURS, Bench, Check
from benchmarks.gpu.cells_stored import NAMES, activated, dense_paths
from benchmarks.gpu.inputs import exact_linear, linears, size_of
from benchmarks.gpu.rows import Target
from sparsebert.kernels.semi_structured_linear import cost, residue_cost
from sparsebert.ops import packed_residue, semi_structured_pack, semi_structured_packed_linear

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
    made = linears(bench, "two_four", "unstructured", shape, rows, sparsity, dtype)

    def make() -> Any:
        s = made()
        semi = s.stored.semi_structured()
        s.packed, s.residue = semi_structured_pack(semi.values, semi.positions), packed_residue(s.stored.residue())
        return s

    def packed(s: Any) -> Tensor:
        return semi_structured_packed_linear(
            s.x, s.packed, s.bias, shape=shape, activation=activation, residue=s.residue
        )

    def nbytes(s: Any) -> int:
        return sum(part.numel() * part.element_size() for part in (s.packed, *s.residue))

    first = make()
    chunks, products = first.residue[2].shape[1:3]
    bench.compare(
        {"N x K": f"{n}x{k}", "M": rows, "sparsity": sparsity, "stored": "2:4 and a residue", "dtype": NAMES[dtype],
         **({"": activation} if activation != "none" else {})},
        make,
        {OURS: packed, **dense_paths(bench, activation)},
        check=Check(
            lambda s: exact_linear(s, activation), lambda s: activated(F.linear(s.x, s.weight, s.bias), activation)
        ),
        limit=cost(rows, n, k, activation=activation, how="packed") + residue_cost(rows, n, chunks, products),
        limit_from="as launched",
        targets=targets,
        facts={"bytes of dense": nbytes(first) / (n * k * size_of(dtype))},
        least=lambda s: int(nbytes(s) + s.x.numel() * s.x.element_size()),
    )  # fmt: skip
