"""Exact top-k masks over all scores: one pass against torch's sort, k-th value and top-k.

Random normal scores, warm caches (the same buffers every time). `sort` and `kthvalue` only find the order or the
threshold; `eager mask` is what mask-learning code does with it: sort, scatter a mask, multiply the weights.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsebert.ops import nm_mask, select_mask, unpack_bits

SIZES = {"one 768x768": 768, "one 3072x768": 3072, "18 of 768x768": 13824}


def eager_mask(scores: Tensor, num_pruned: int, weight: Tensor, out: Tensor) -> None:
    """The usual way (nn_pruning's top-k binarizer): a sort of all scores, a scattered mask, a product."""
    order = torch.sort(scores.reshape(-1)).indices
    mask = torch.ones_like(scores)
    mask.view(-1)[order[:num_pruned]] = 0.0
    out.copy_(weight * mask)


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
@pytest.mark.parametrize("size", SIZES)
def test_select_mask(bench: Any, size: str, sparsity: float) -> None:
    scores, weight = torch.randn(SIZES[size], 768), torch.randn(SIZES[size], 768)
    out, flat = torch.empty(scores.shape, dtype=torch.bfloat16), scores.view(-1)
    pruned = int(sparsity * flat.numel())
    bits = select_mask([scores], pruned)
    # No speed is reported on a wrong result.
    assert torch.equal(unpack_bits(bits[0], scores.shape), scores > torch.kthvalue(flat, pruned).values)
    timings = bench.interleave(
        {
            "select": lambda: select_mask([scores], pruned),
            "select + W·mask": lambda: select_mask([scores], pruned, [weight], [out]),
            "sort": lambda: torch.sort(flat),
            "kthvalue": lambda: torch.kthvalue(flat, pruned),
            "topk": lambda: torch.topk(flat, flat.numel() - pruned, sorted=False),
            "eager mask": lambda: eager_mask(scores, pruned, weight, out),
        }
    )
    bench.row(
        "select_mask", {"scores": size, "M": round(flat.numel() / 1e6, 2), "sparsity": sparsity}, timings, "select"
    )


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 16)])
def test_nm_mask(bench: Any, n: int, m: int) -> None:
    scores = torch.randn(3072, 768)

    def eager() -> Tensor:
        groups = scores.view(-1, m)
        return torch.zeros_like(groups).scatter_(1, groups.topk(n, dim=1).indices, 1.0)

    assert torch.equal(unpack_bits(nm_mask(scores, n, m), (3072 * 768 // m, m)), eager().bool())
    timings = bench.interleave({"nm_mask": lambda: nm_mask(scores, n, m), "eager topk": eager})
    bench.row("nm_mask", {"pattern": f"{n}:{m}", "scores": "3072x768"}, timings, "nm_mask")
