"""What the tests of block-sparse attention share, on every backend: cases, and the promise in plain torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsebert.ops import BlockLists, block_sparse_attention

Tensors = tuple[Tensor, ...]


@dataclass
class Case:
    """One call; `lengths` are those of sequences without padding, else there are `batches` of `(queries, keys)`."""

    block: tuple[int, int] = (16, 16)
    batches: int = 2
    heads: int = 2
    sizes: tuple[int, int] = (40, 56)
    dim: int = 32
    dtype: torch.dtype = torch.float32
    shared: bool = False
    density: float = 0.5
    partial: float = 0.5
    padding: bool = False
    lengths: Sequence[int] | None = None
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        if self.lengths is not None:
            self.batches, self.sizes = len(self.lengths), (max(self.lengths, default=0),) * 2
        own = (1, 1) if self.shared else (self.batches, self.heads)
        self.mask = random_mask((*own, *self.sizes), self.block, self.density, self.partial, generator)
        self.lists = BlockLists.from_mask(self.mask, self.block).to(self.device)
        self.q, self.k, self.v = (self._normal(length, generator) for length in (self.sizes[0], *self.sizes[1:] * 2))
        self.above, sums = self._normal(self.sizes[0], generator), self._normal(self.sizes[0], generator)[..., 0]
        self.above_lse = (sums if self.lengths is None else sums.T).to(torch.promote_types(self.dtype, torch.float32))
        self.key_mask = self.cu_seqlens = None
        if self.padding:
            kept = torch.randint(1, self.sizes[1] + 1, (self.batches, 1), generator=generator)
            self.key_mask = (torch.arange(self.sizes[1]) < kept).to(self.device)
        if self.lengths is not None:
            starts = [0, *itertools.accumulate(self.lengths)]
            self.cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=self.device)

    def _normal(self, length: int, generator: torch.Generator) -> Tensor:
        """As a model has it: heads beside each other in the memory of a token, so not contiguous."""
        outer = (sum(self.lengths),) if self.lengths is not None else (self.batches, length)
        x = torch.randn(*outer, self.heads, self.dim, generator=generator, dtype=torch.float64).to(self.dtype)
        return (x if self.lengths is not None else x.transpose(1, 2)).to(self.device)

    def run(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensors:
        """The op: `(out, lse)`."""
        chosen = {"key_mask": self.key_mask, "cu_seqlens": self.cu_seqlens, **options}
        out, lse = block_sparse_attention(q, k, v, self.lists, return_lse=True, **chosen)
        return out, lse

    def plain(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensors:
        """The promise: softmax over the whole score matrix, -inf where nothing is attended."""
        mask = self.mask.to(q.device)
        if self.lengths is None:
            mask = mask if self.key_mask is None else mask & self.key_mask[:, None, None]
            return _plain(q, k, v, mask, scale)
        parts = []
        for i, (begin, end) in enumerate(itertools.pairwise([0, *itertools.accumulate(self.lengths)])):
            own = mask[i if mask.shape[0] > 1 else 0, :, : end - begin, : end - begin]
            parts.append(_plain(*(x[begin:end].transpose(0, 1) for x in (q, k, v)), own, scale))
        if not parts:
            return q[:0], q.new_empty(q.shape[1], 0)
        return torch.cat([out.transpose(0, 1) for out, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)

    def gradients(self, run: Callable[..., Tensors], dtype: torch.dtype) -> Tensors:
        """Of q, k and v, through the result and, where finite, the log-sum-exp."""
        leaves = tuple(x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v))
        out, lse = run(*leaves)
        finite = torch.where(lse.isinf(), 0.0, lse)
        loss = (out * self.above.to(dtype)).sum() + (finite * self.above_lse.to(lse.dtype)).sum()
        return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensors:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-1, -2)).to(wide) * scale
    some = mask.any(-1)
    # A finite stand-in for -inf, so that rows without anything have no NaN in their gradient either.
    shares = torch.softmax(scores.masked_fill(~mask, -1e30), dim=-1) * mask
    lse = torch.logsumexp(scores.masked_fill(~mask, -1e30), dim=-1).masked_fill(~some, -torch.inf)
    return shares.to(v.dtype) @ v, lse


def random_mask(
    shape: Sequence[int], block: Sequence[int], density: float, partial: float, generator: torch.Generator
) -> Tensor:
    """bool `shape`: a share `density` of its blocks, of which a share `partial` attend half of their scores."""
    grid = [*shape[:2], -(-shape[2] // block[0]), -(-shape[3] // block[1])]

    def spread(chosen: Tensor) -> Tensor:
        return chosen.repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)[:, :, : shape[2], : shape[3]]

    kept = spread(torch.rand(grid, generator=generator) < density)
    whole = spread(torch.rand(grid, generator=generator) >= partial)
    return kept & (whole | (torch.rand(*shape, generator=generator) < 0.5))


def check(case: Case, within: Callable[..., None]) -> None:
    """Result, log-sum-exp and gradients within torch's own error at the same dtype."""
    tensors = (case.q, case.k, case.v)
    out, lse = case.run(*tensors)
    assert out.dtype == case.dtype and out.shape == case.q.shape
    assert lse.dtype == torch.promote_types(case.dtype, torch.float32)
    usual, exact = (case.plain(*(x.to(dtype) for x in tensors)) for dtype in (case.dtype, torch.float64))
    within(out, usual[0], exact[0], 2.0, tiny=True)
    empty = exact[1].isinf()
    assert torch.equal(lse.isinf(), empty)
    # torch rounds the scores to the dtype; the kernels need not.
    room = max(1e-5, 8 * torch.finfo(case.dtype).eps)
    torch.testing.assert_close(lse[~empty].double(), exact[1][~empty], rtol=room, atol=room)
    rows = empty if case.lengths is None else empty.T
    assert bool((out[rows] == 0).all())
    ours = case.gradients(case.run, case.dtype)
    own, truth = case.gradients(case.plain, case.dtype), case.gradients(case.plain, torch.float64)
    assert all(part.dtype == case.dtype for part in ours)
    assert bool((ours[0][rows] == 0).all())
    # Together: the terms of dq and dk, which may cancel, are of the size of dv.
    result, usually, exactly = (torch.cat([part.flatten() for part in parts]) for parts in (ours, own, truth))
    within(result, usually, exactly, 3.0, tiny=True)
