"""Linears and embeddings that show one of many masks, or each task's own to that task's rows of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsebert.ops.dense_linear import dense_linear
from sparsebert.ops.masked_weight import masked_weight, masked_weights

__all__ = ["PackedEmbedding", "PackedLinear", "Running", "show"]


@torch.no_grad()
def show(layers: Sequence[_Packed], task: str | None) -> None:
    """Writes the task's W·mask into every layer's `weight`, in place and in one pass; None writes the base's own."""
    masked: list[tuple[Tensor, Tensor, Tensor]] = []
    for layer in layers:
        bits = layer._bits(task)
        if bits is None:
            layer.weight.copy_(layer.full)
        else:
            masked.append((layer.full, bits, layer.weight))
    if masked:
        masked_weights(*zip(*masked, strict=True))


class Running:
    """What all packed layers of one model share: whose product they hold, and how a mixed batch is cut.

    A mixed batch's rows lie together by task: `groups` names the tasks in their order, None for an ordinary batch.
    """

    def __init__(self) -> None:
        self.task: str | None = None
        self.groups: Sequence[str] | None = None
        self.rows: Sequence[int] = ()
        self.tokens: Sequence[int] = ()
        self._scratch: Tensor | None = None

    @contextmanager
    def mixed(self, groups: Sequence[str], rows: Sequence[int], tokens: Sequence[int]) -> Iterator[None]:
        """In this context the layers give each task's `rows`, or its real `tokens`, the task's own weights."""
        self.groups, self.rows, self.tokens = groups, rows, tokens
        try:
            yield
        finally:
            self.groups = None

    def sizes(self, x: Tensor) -> Sequence[int]:
        """How long each group is along the first axis of a layer's input."""
        total, by_row, by_token = x.shape[0], sum(self.rows), sum(self.tokens)
        # A padding-free model gives linears tokens [tokens, K], but the pooler rows [rows, K].
        if total == by_row and (x.dim() > 2 or by_row != by_token or self.rows == self.tokens):
            return self.rows
        if total == by_token != by_row and x.dim() == 2:
            return self.tokens
        raise RuntimeError(
            f"a mixed batch of {by_row} rows and {by_token} tokens gave a layer {list(x.shape)}; expected one of them "
            "along its first axis, and no row of padding alone"
        )

    def scratch(self, like: Tensor) -> Tensor:
        """Memory of `like`'s shape and kind for one product at a time: kept, so that it stays in the cache."""
        held = self._scratch
        if held is None or held.numel() < like.numel() or held.dtype != like.dtype or held.device != like.device:
            held = self._scratch = like.new_empty(like.numel())
        return held[: like.numel()].view(like.shape)


class _Packed(nn.Module):
    """What both share: the base's weight, the running product of it and a mask, and the masks by task."""

    weight: nn.Parameter
    full: Tensor

    def _setup(self, weight: Tensor, running: Running) -> None:
        full = weight.detach()
        self.weight = nn.Parameter(full.clone(), requires_grad=False)
        self.register_buffer("full", full, persistent=False)
        self.bits: dict[str, Tensor] = {}
        self.running = running

    def _bits(self, task: str | None) -> Tensor | None:
        """The task's mask on the weight's device; None where the task leaves this matrix whole."""
        bits = self.bits.get(task) if task is not None else None
        if bits is not None and task is not None and bits.device != self.full.device:
            bits = self.bits[task] = bits.to(self.full.device)
        return bits

    def _parts(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Each group of a mixed batch, with its task."""
        yield from zip(self.running.groups or (), x.split(list(self.running.sizes(x))), strict=True)


class PackedLinear(_Packed):
    """`nn.Linear` over one of many masks of its weight.

    Args:
        linear: the module it takes the place of.
        running: shared by all packed layers of the model.
    """

    def __init__(self, linear: nn.Linear, running: Running) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._setup(linear.weight, running)

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, ..., in]` to `[rows, ..., out]`."""
        if self.running.groups is None:
            return dense_linear(x, self.weight, self.bias)
        return torch.cat([dense_linear(part, self._product(task), self.bias) for task, part in self._parts(x)])

    def _product(self, task: str) -> Tensor:
        if task == self.running.task:
            return self.weight
        bits = self._bits(task)
        return self.full if bits is None else masked_weight(self.full, bits, out=self.running.scratch(self.full))


class PackedEmbedding(_Packed):
    """`nn.Embedding` over one of many masks of its table; arguments as for `PackedLinear`."""

    def __init__(self, embedding: nn.Embedding, running: Running) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        self._setup(embedding.weight, running)

    def forward(self, ids: Tensor) -> Tensor:
        """Integer ids `[rows, ...]` to `[rows, ..., width]`; one row of ids serves all rows of a mixed batch."""
        if self.running.groups is None:
            return F.embedding(ids, self.weight)
        rows = self.running.rows
        parts = ids.expand(sum(rows), *ids.shape[1:]).split(list(rows))
        return torch.cat([self._looked_up(task, part) for task, part in zip(self.running.groups, parts, strict=True)])

    def _looked_up(self, task: str, ids: Tensor) -> Tensor:
        bits = self._bits(task)
        found = F.embedding(ids, self.full)
        if bits is None:
            return found
        # Only the rows that are looked up: a whole table's product would cost more than all the linears'.
        places = ids[..., None] * self.embedding_dim + torch.arange(self.embedding_dim, device=ids.device)
        kept = (bits[places >> 3] >> (places & 7).to(torch.uint8)) & 1
        return found.where(kept.bool(), 0.0)
