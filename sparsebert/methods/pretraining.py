"""Pre-training losses as a training objective: masked language modelling, and the states of the dense model itself."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sparsebert.models.capture import Capture, Needs, layers_of
from sparsebert.models.mlm_head import MaskedLMHead, word_embeddings
from sparsebert.models.task_model import TaskModel
from sparsebert.ops.hidden_cosine import hidden_cosine

__all__ = ["LOSSES", "Pretraining", "frozen_copy", "held_out_losses", "two_segments"]

LOSSES: dict[str, tuple[str, ...]] = {"mlm": ("mlm",), "kd": ("kd",), "mlm+kd": ("mlm", "kd")}
"""What `--objective` stands for: `mlm`, cross-entropy at the places to predict; `kd`, the mean over the layers of
1 - cosine between a token's state and the dense model's."""

_TOKENS_MEASURED = 65536
_BLOCKS_AT_ONCE = 16


def frozen_copy(model: TaskModel) -> TaskModel:
    """The model as it is now, in eval mode, on the very same parameters: no memory is taken.

    Good for as long as those are not trained; masks that are put into `model` later do not reach the copy.
    """
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, shared).eval()


class Pretraining:
    """A training objective over packed text: the sum of the losses asked for.

    Args:
        model: that is trained.
        losses: `mlm`, `kd` or both.
        head: for `mlm`.
        dense: for `kd`: what the states are compared with; of the same layers.
        segments: whether blocks go through `two_segments`, where the model tells segments apart.
    """

    def __init__(
        self,
        model: TaskModel,
        losses: Sequence[str],
        head: MaskedLMHead | None = None,
        dense: TaskModel | None = None,
        segments: bool = False,
    ) -> None:
        if "mlm" in losses and head is None:
            raise ValueError("head: needed for mlm")
        if "kd" in losses and dense is None:
            raise ValueError("dense: needed for kd")
        self.model, self.head, self.dense = model, head, dense
        self.names = tuple(losses)
        config = model.base.config
        self.segments = segments and config.model_type == "bert" and config.type_vocab_size > 1
        self.parts: dict[str, Tensor] = {}
        """Each loss's newest value; for the log."""

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`loss`, a scalar; `batch` as `MaskedText` has it."""
        losses = self.losses(batch)
        self.parts = {name: value.detach() for name, value in losses.items()}
        return {"loss": torch.stack(list(losses.values())).sum()}

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every loss by its name, scalar fp32."""
        batch = two_segments(batch) if self.segments else batch
        last = len(layers_of(self.model.base))
        layers = range(1, last + 1) if "kd" in self.names else (last,)
        states = _states(self.model, batch, layers)
        losses = {}
        if "mlm" in self.names and self.head is not None:
            losses["mlm"] = self.head.loss(states[-1], batch["labels"], word_embeddings(self.model.base))
        if "kd" in self.names and self.dense is not None:
            with torch.no_grad():
                targets = _states(self.dense, batch, layers)
            with torch.autocast(device_type=states[-1].device.type, enabled=False):
                losses["kd"] = hidden_cosine(states, targets)
        return losses

    def logs(self) -> dict[str, float]:
        """The newest value of every loss."""
        return {f"{name}_loss": float(value) for name, value in self.parts.items()}


def two_segments(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every second block, on average, as a pair of texts, as BERT's own pre-training and tasks on pairs have them.

    A [SEP] takes the place of one token, and what follows it has token type 1. Which blocks, and where, follows from
    their tokens alone, so that nothing is drawn that a resumed run would have to draw again.

    Args:
        batch: `input_ids` `[batch, seq]`, blocks that end with [SEP]; `labels` if there are any.
    """
    ids = batch["input_ids"]
    length = ids.shape[1]
    places = torch.arange(length, device=ids.device)
    # From 1 to twice the last place inside a block: in half of the cases there is no such place.
    point = (ids.sum(1, keepdim=True) % (2 * (length - 2))) + 1
    cut = (places == point) & (point < length - 1)
    second = (places > point) & (point < length - 1)
    changed = {**batch, "input_ids": torch.where(cut, ids[:, -1:], ids), "token_type_ids": second.long()}
    if "labels" in batch:
        changed["labels"] = batch["labels"].masked_fill(cut, -100)
    return changed


def _states(model: TaskModel, batch: Mapping[str, Tensor], layers: Sequence[int]) -> list[Tensor]:
    """The layers' states, `[batch, seq, width]` each."""
    with Capture(model.base, Needs(hidden=frozenset(layers))) as capture:
        model.encode(batch["input_ids"], batch.get("attention_mask"), batch.get("token_type_ids"))
    return [capture.states.hidden[layer] for layer in layers]


@torch.no_grad()
def held_out_losses(objective: Pretraining, blocks: Any, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Mean losses on held-out text in eval mode, over at most its first 65,536 tokens.

    Args:
        objective: whose losses are asked for.
        blocks: a `MaskedText` that was not trained on.
        dtype: that is computed in; other than fp32 by autocast.

    Returns:
        The means by `mlm_loss` and `kd_loss`.
    """
    model = objective.model
    training, device = model.training, next(model.parameters()).device
    count = min(len(blocks), max(1, _TOKENS_MEASURED // len(blocks[0]["input_ids"])))
    sums: dict[str, float] = {}
    model.eval()
    try:
        for batch in DataLoader([blocks[i] for i in range(count)], _BLOCKS_AT_ONCE, collate_fn=_tensors):  # type: ignore[arg-type]
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                losses = objective.losses({name: tensor.to(device) for name, tensor in batch.items()})
            for name, value in losses.items():
                sums[f"{name}_loss"] = sums.get(f"{name}_loss", 0.0) + float(value) * len(batch["input_ids"])
    finally:
        model.train(training)
    return {name: total / count for name, total in sums.items()}


def _tensors(items: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
    return {name: torch.tensor([item[name] for item in items]) for name in items[0]}
