"""A pre-trained encoder with a task head: classification, regression or spans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsebert._html import table
from sparsebert._show import rich_table
from sparsebert.errors import unknown
from sparsebert.models.prunable import in_a_few_words

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel

__all__ = ["HEADS", "KINDS", "POOLINGS", "LinearHead", "ScalarMixHead", "TaskModel"]

KINDS = ("classification", "regression", "span")
HEADS = ("mlp", "linear")
POOLINGS = ("cls", "mean")


class ScalarMixHead(nn.Module):
    """A learned average over all layers' states, then an MLP with one ReLU layer: the head of Adapting by Pruning.

    The average is the scalar mix of Peters et al. (2018, "Deep contextualized word representations", eq. 1):
    `gamma * sum_j softmax(mix)_j * h_j`, over the embedding output and every layer; it starts as the plain mean.

    Args:
        layers: number of states that are mixed (encoder layers + 1).
        width: width of a state.
        outputs: number of outputs.
        hidden: units of the ReLU layer.
        dropout: probability, before each of the two linears.
        generator: source of the initial weights; None takes torch's global one.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        outputs: int,
        hidden: int = 768,
        dropout: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(layers))
        self.gamma = nn.Parameter(torch.ones(()))
        self.dense = nn.Linear(width, hidden)
        self.output = nn.Linear(hidden, outputs)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.dense, self.output):
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5), generator=generator)
            nn.init.zeros_(linear.bias)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """`states`: `layers` tensors `[..., width]` of any float dtype; returns fp32 `[..., outputs]`."""
        if len(states) != self.mix.numel():
            raise ValueError(f"states: expected {self.mix.numel()} of them, got {len(states)}")
        shares = self.mix.softmax(0)
        mixed = shares[0] * states[0].float()
        for share, state in zip(shares[1:], states[1:], strict=True):
            mixed = mixed + share * state.float()
        features = F.relu(self.dense(self.dropout(self.gamma * mixed)))
        return self.output(self.dropout(features))


class LinearHead(nn.Module):
    """Dropout and one linear, as in BERT's own fine-tuning (Devlin et al., 2019).

    Args:
        width: width of a state.
        outputs: number of outputs.
        dropout: probability.
        generator: source of the initial weights, N(0, 0.02); None takes torch's global one.
    """

    def __init__(
        self, width: int, outputs: int, dropout: float = 0.1, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(width, outputs)
        nn.init.normal_(self.output.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.output.bias)

    def forward(self, state: Tensor) -> Tensor:
        """`state`: `[..., width]` of any float dtype; returns fp32 `[..., outputs]`."""
        return self.output(self.dropout(state.float()))


class TaskModel(nn.Module):
    """A base model and a task head. `forward(**batch)` returns the loss and the logits.

    Args:
        base: a BERT, RoBERTa or DistilBERT model (`sparsebert.models.load.load_base`).
        kind: `classification`, `regression` or `span`.
        num_labels: classes; regression always has 1 output and spans 2, whatever is given.
        head: `mlp` is `ScalarMixHead`, `linear` is `LinearHead`.
        pooling: how one vector is made of a sequence: the first token's (`cls`; the linear head takes the pooler's
            output where the base has a pooler) or the mean over the tokens of the attention mask. Spans have none.
        head_width: units of the MLP's ReLU layer.
        seed: of the head's initial weights; None draws from torch's global generator.
        label_names: the names of the classes, in the order of their numbers; kept with a saved model.

    Raises:
        UserError: an unknown kind, head or pooling.
        ValueError: numbers that do not fit.
    """

    base: PreTrainedModel
    head: nn.Module

    def __init__(
        self,
        base: PreTrainedModel,
        kind: str,
        num_labels: int,
        head: str = "mlp",
        pooling: str = "cls",
        head_width: int = 768,
        seed: int | None = None,
        label_names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        _check(kind, num_labels, head, pooling, head_width, label_names)
        self.base = base
        self.kind = kind
        self.num_labels = {"regression": 1, "span": 2}.get(kind, num_labels)
        self.head_kind = head
        self.pooling = pooling
        self.head_width = head_width
        self.label_names = tuple(label_names)
        self._base_dropout = True
        config = base.config
        # RoBERTa's table has one row and DistilBERT takes none: only BERT tells sentences apart.
        self._takes_token_types = config.model_type == "bert"
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        width, states = int(config.hidden_size), int(config.num_hidden_layers) + 1
        if head == "mlp":
            _prime(base)
            self.head = ScalarMixHead(states, width, self.num_labels, head_width, generator=generator)
        else:
            self.head = LinearHead(width, self.num_labels, generator=generator)
        self.head.to(base.device)

    def set_base_dropout(self, enabled: bool) -> None:
        """Whether the base follows `train()`; when False it stays in eval mode, so that its features are the same
        in every step (a frozen base). The head's own dropout always follows `train()`."""
        self._base_dropout = enabled
        self.train(self.training)

    def train(self, mode: bool = True) -> TaskModel:
        """As `nn.Module.train`, but for a base whose dropout is off."""
        super().train(mode)
        if not self._base_dropout:
            self.base.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Logits, and the loss where the answers are given.

        Args:
            input_ids: `[batch, seq]` int64.
            attention_mask: `[batch, seq]`, 0 at padding; None where there is none.
            token_type_ids: `[batch, seq]` int64; left out for models that take none.
            labels: `[batch]`: int64 classes, or float targets for regression.
            start_positions, end_positions: `[batch]` int64, spans only; a position outside the sequence or on padding
                counts for nothing.

        Returns:
            fp32, whatever autocast says: `logits` `[batch, num_labels]` (regression `[batch]`), or for spans
            `start_logits` and `end_logits` `[batch, seq]` with the lowest finite number at padding; `loss`, a scalar:
            cross-entropy, mean squared error, or the mean of the start's and the end's cross-entropy.

        Raises:
            ValueError: answers that do not belong to this kind of task.
        """
        self._check_answers(labels, start_positions, end_positions)
        extra: dict[str, Any] = {"output_hidden_states": True} if self.wants_all_states else {}
        output = self.encode(input_ids, attention_mask, token_type_ids, **extra)
        return self.answer(output, attention_mask, labels, start_positions, end_positions)

    def _shown(self) -> list[tuple[str, str]]:
        """What a glance at the model shows: name and value."""
        outputs = ", ".join(self.label_names) or str(self.num_labels)
        return [
            ("base", in_a_few_words(self.base)),
            ("task", f"{self.kind}: {outputs}"),
            ("head", self.head_kind if self.kind == "span" else f"{self.head_kind}, {self.pooling}"),
            ("parameters", f"{sum(parameter.numel() for parameter in self.parameters()):,}"),
            ("runs in", f"{self.base.dtype} on {self.base.device}".removeprefix("torch.")),
        ]

    def __rich__(self) -> Table:
        return rich_table(type(self).__name__, (), self._shown())

    def _repr_html_(self) -> str:
        return table(type(self).__name__, (), self._shown())

    @property
    def wants_all_states(self) -> bool:
        """Whether the head reads `hidden_states` of the base's output, not only its last."""
        return self.head_kind == "mlp"

    def answer(
        self,
        output: Any,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What `forward` returns, from the base's own output (`encode`)."""
        # The head is a small part of the work: it runs in fp32, so that equal inputs rank equally under any autocast.
        features = self._features(output, attention_mask)
        with torch.autocast(device_type=output.last_hidden_state.device.type, enabled=False):
            outputs = self.head(features)
            if self.kind == "span":
                return _span_output(outputs, attention_mask, start_positions, end_positions)
            if self.kind == "regression":
                logits = outputs.squeeze(-1)
                return _with_loss({"logits": logits}, None if labels is None else F.mse_loss(logits, labels.float()))
            return _with_loss({"logits": outputs}, None if labels is None else F.cross_entropy(outputs, labels))

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **extra: Any,
    ) -> Any:
        """The base's own output, the head left out; arguments as for `forward`, `extra` for the base."""
        if self._takes_token_types and token_type_ids is not None:
            extra["token_type_ids"] = token_type_ids
        return self.base(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **extra)

    def _features(self, output: Any, attention_mask: Tensor | None) -> Tensor | list[Tensor]:
        if self.wants_all_states:
            return [self._pool(state, attention_mask) for state in output.hidden_states]
        pooled = getattr(output, "pooler_output", None)
        if self.kind != "span" and self.pooling == "cls" and pooled is not None:
            return pooled
        return self._pool(output.last_hidden_state, attention_mask)

    def _pool(self, state: Tensor, attention_mask: Tensor | None) -> Tensor:
        """`[batch, seq, width]` to `[batch, width]`; spans keep every token."""
        if self.kind == "span":
            return state
        if self.pooling == "cls":
            return state[:, 0]
        if attention_mask is None:
            return state.float().mean(1)
        kept = attention_mask.to(torch.float32)[:, :, None]
        return (state.float() * kept).sum(1) / kept.sum(1).clamp(min=1)

    def _check_answers(self, labels: Tensor | None, start: Tensor | None, end: Tensor | None) -> None:
        if self.kind == "span":
            if labels is not None:
                raise ValueError("labels: a span task takes start_positions and end_positions instead")
            if (start is None) != (end is None):
                raise ValueError("start_positions and end_positions: expected both or neither, got one of them")
        elif start is not None or end is not None:
            raise ValueError(f"start_positions, end_positions: a {self.kind} task takes labels instead")


def _check(kind: str, num_labels: int, head: str, pooling: str, head_width: int, names: Sequence[str]) -> None:
    if kind not in KINDS:
        raise unknown("kind of task", kind, KINDS)
    if head not in HEADS:
        raise unknown("head", head, HEADS)
    if pooling not in POOLINGS:
        raise unknown("pooling", pooling, POOLINGS)
    if kind == "classification" and num_labels < 2:
        raise ValueError(f"num_labels: expected at least 2 classes, got {num_labels}")
    if head_width < 1:
        raise ValueError(f"head_width: expected at least 1, got {head_width}")
    if kind == "classification" and names and len(names) != num_labels:
        raise ValueError(f"label_names: expected {num_labels} names, got {len(names)}")


def _prime(base: PreTrainedModel) -> None:
    """transformers hooks the layers in the first call that wants hidden states, which torch.compile cannot trace."""
    training = base.training
    base.eval()
    with torch.no_grad():
        base(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=base.device), output_hidden_states=True)
    base.train(training)


def _with_loss(output: dict[str, Tensor], loss: Tensor | None) -> dict[str, Tensor]:
    return output if loss is None else {"loss": loss, **output}


def _span_output(
    outputs: Tensor, attention_mask: Tensor | None, start: Tensor | None, end: Tensor | None
) -> dict[str, Tensor]:
    """`outputs` `[batch, seq, 2]` to start and end logits and their loss."""
    tokens = torch.ones_like(outputs[..., 0], dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    first, last = outputs.masked_fill(~tokens[..., None], torch.finfo(outputs.dtype).min).unbind(-1)
    logits = {"start_logits": first, "end_logits": last}
    if start is None or end is None:
        return logits
    return _with_loss(logits, (_position_loss(first, start, tokens) + _position_loss(last, end, tokens)) / 2)


def _position_loss(logits: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy over the rows whose position lies on a token; 0 where none does."""
    inside = (positions >= 0) & (positions < logits.shape[1])
    inside = inside & tokens.gather(1, positions.where(inside, 0)[:, None])[:, 0]
    total = F.cross_entropy(logits, positions.where(inside, -100), ignore_index=-100, reduction="sum")
    return total / inside.sum().clamp(min=1)
