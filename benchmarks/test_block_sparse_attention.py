"""Block-sparse attention against torch's dense attention, and against FlexAttention on the same blocks.

BERT-base's heads (12 of 64) on random normal numbers laid out as its projections leave them, warm caches (the same
tensors every time). The blocks of 64 x 64 are drawn by chance, for each head its own, the same number in every row and
its own block among them; `sparsity` is the share of blocks left out, as it came out. "sdpa" is
`F.scaled_dot_product_attention` without a mask, which is the faster way to call it; "sdpa masked" gives it the mask
that attends to the same scores; "flex" is FlexAttention as it runs without being compiled. Padded rows leave out a
third of the keys of each sequence on average: sdpa gets them as a mask, for it cannot do without. `step` is the
forward alone (without autograd), or forward and backward with a gradient from above. No speed is reported on a wrong
result: each case is compared with attention in float64 first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsebert.nn.attention_patterns import random
from sparsebert.ops import BlockLists, block_sparse_attention

DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = (128, 256, 512, 1024)
SPARSITIES = (0.0, 0.5, 0.75, 0.875, 0.95)
STEPS = ("forward", "forward + backward")
HEADS, DIM, BLOCK = 12, 64, 64
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the norm
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def tensors(batch: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient from above, `[batch, HEADS, length, DIM]` with tokens outermost in memory."""
    return [torch.randn(batch, length, HEADS, DIM).to(dtype).transpose(1, 2) for _ in range(4)]


def gradients(attend: Attention, leaves: list[Tensor], above: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(attend(*leaves), leaves, above)


def check(attend: Attention, parts: list[Tensor], mask: Tensor) -> None:
    """Result and gradients against float64."""

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shares = torch.softmax((q @ k.mT * DIM**-0.5).masked_fill(~mask, -torch.inf), -1)
        return shares @ v

    leaves = [x.detach().clone().requires_grad_() for x in parts[:3]]
    wide = [x.detach().double().requires_grad_() for x in parts[:3]]
    found = (attend(*leaves), *gradients(attend, leaves, parts[3]))
    truth = (plain(*wide), *gradients(plain, wide, parts[3].double()))
    for one, true in zip(found, truth, strict=True):
        assert (one.double() - true).norm() <= ALLOWED[parts[0].dtype] * true.norm()


def race(bench: Any, table: str, case: dict[str, Any], candidates: dict[str, Attention], parts: list[Tensor]) -> None:
    """Time the candidates on the case's step."""
    if case["step"] == "forward":

        def run(attend: Attention) -> Any:
            with torch.no_grad():
                return attend(*parts[:3])
    else:
        leaves = [x.detach().clone().requires_grad_() for x in parts[:3]]

        def run(attend: Attention) -> Any:
            return gradients(attend, leaves, parts[3])

    timings = bench.interleave({name: lambda attend=attend: run(attend) for name, attend in candidates.items()})
    bench.row(table, case, timings, "sparse")


def ours(blocks: BlockLists, key_mask: Tensor | None = None) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = block_sparse_attention(q, k, v, blocks, key_mask=key_mask)
        assert isinstance(out, Tensor)
        return out

    return attend


def cells(full: bool, length: int, sparsity: float, dtype: torch.dtype) -> bool:
    """Whether a cell is measured without --full: those of the goal, and the edges."""
    return full or (length == 512 and (sparsity in (0.0, 0.75) or dtype == torch.float32))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("length", LENGTHS)
def test_against_dense(bench: Any, full: bool, length: int, sparsity: float, dtype: torch.dtype, step: str) -> None:
    if not cells(full, length, sparsity, dtype):
        pytest.skip("only with --full")
    blocks = random(length, 1 - sparsity, heads=HEADS, block=(BLOCK, BLOCK))
    mask, parts = blocks.to_mask(), tensors(1, length, dtype)
    check(ours(blocks), parts, mask)
    candidates: dict[str, Attention] = {"sparse": ours(blocks), "sdpa": F.scaled_dot_product_attention}
    if blocks.density() < 1:
        candidates["sdpa masked"] = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    case = {"S": length, "sparsity": round(1 - blocks.density(), 3), "dtype": str(dtype)[6:], "step": step}
    race(bench, "block_sparse_attention", case, candidates, parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.75])
def test_with_padding(bench: Any, sparsity: float, dtype: torch.dtype) -> None:
    batch, length = 4, 512
    blocks = random(length, 1 - sparsity, heads=HEADS, block=(BLOCK, BLOCK))
    kept = torch.arange(length) < torch.randint(length // 3, length + 1, (batch, 1))
    mask = kept[:, None, None].expand(-1, -1, length, -1)
    both, parts = mask & blocks.to_mask(), tensors(batch, length, dtype)
    # A row whose blocks are all padding is 0, which the plain softmax does not know.
    some = both.any(-1)
    parts[3] = parts[3] * some[..., None]
    with torch.no_grad():
        found = ours(blocks, kept)(*parts[:3])
        assert bool((found[~some] == 0).all())
        exact = F.scaled_dot_product_attention(*(x.double() for x in parts[:3]), attn_mask=both)
        assert (found[some].double() - exact[some]).norm() <= ALLOWED[dtype] * exact[some].norm()
    candidates: dict[str, Attention] = {
        "sparse": ours(blocks, kept),
        "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
    }
    for step in STEPS:
        case = {"B": batch, "S": length, "sparsity": round(1 - blocks.density(), 3), "dtype": str(dtype)[6:]}
        race(bench, "block_sparse_attention_padded", {**case, "step": step}, candidates, parts)


@pytest.mark.parametrize("length", [256, 512])
def test_against_flex_attention(bench: Any, full: bool, length: int) -> None:
    if not full:
        pytest.skip("only with --full")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from sparsebert.nn.attention_patterns import from_flex

    made = create_block_mask(lambda b, h, q, k: (q - k).abs() <= 64, None, None, length, length, "cpu", BLOCK)
    blocks, parts = from_flex(made), tensors(1, length, torch.float32)
    check(ours(blocks), parts, blocks.to_mask())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled
        candidates = {"sparse": ours(blocks), "flex": lambda q, k, v: flex_attention(q, k, v, block_mask=made)}
        case = {"S": length, "density": round(blocks.density(), 3), "dtype": "float32", "step": "forward"}
        race(bench, "block_sparse_attention_flex", case, candidates, parts)
