"""Texts to token ids, and token ids to padded batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsebert.data.spans import SpanExample, encode_spans
from sparsebert.data.tasks import CLASSIFICATION, SPAN, TaskSpec
from sparsebert.errors import UserError

__all__ = ["Collator", "Encoded", "encode"]

_ROWS_AT_ONCE = 2000


class Encoded(torch.utils.data.Dataset[dict[str, Any]]):
    """Token ids of a split, unpadded, in flat arrays; an item is a dict of lists and numbers for `Collator`.

    An item has `input_ids`, `attention_mask` (all ones), `token_type_ids` where the tokenizer gives them, and
    `labels` (int for classes, float for numbers) or `start_positions` and `end_positions`. For a span task an item
    is a window of a context, and a row of the data may have several.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        ids: np.ndarray,
        type_ids: np.ndarray | None,
        targets: Mapping[str, np.ndarray],
        examples: Sequence[SpanExample] = (),
        features: np.ndarray | None = None,
        token_chars: np.ndarray | None = None,
        cls_positions: np.ndarray | None = None,
        label_ids: Mapping[str, int] | None = None,
    ) -> None:
        self.lengths: list[int] = list(lengths)
        """Tokens of each item."""
        self._bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths, dtype=np.int64)])
        # All items one after the other: lists of Python integers would take nine times the memory.
        self._ids = ids
        self._types = type_ids
        self.targets = dict(targets)
        """`[items]` arrays by name: "labels", or "start_positions" and "end_positions"."""
        self.examples = list(examples)
        """Span: the rows of the data, for scoring."""
        self.features = features
        """Span: `[items]` number of each window's row in `examples`."""
        self.cls_positions = cls_positions
        """Span: `[items]` where in the window "no answer" points."""
        self.label_ids = dict(label_ids or {})
        """Classification: label name to the number in `labels`; `compute_metrics` takes it."""
        self._token_chars = token_chars

    @property
    def labels(self) -> np.ndarray:
        """`[items]` labels, int64 or float32, as `compute_metrics` takes them."""
        if "labels" not in self.targets:
            raise UserError("a span task has start and end positions, no labels")
        return self.targets["labels"]

    def token_chars(self, index: int) -> np.ndarray:
        """Span: `[tokens, 2]` first and one-past-last character in the context; -1 for tokens outside the context.

        Raises:
            UserError: the data were encoded with `training=True`, which does not keep them.
        """
        if self._token_chars is None:
            raise UserError("no character positions: encode with training=False to score a span task")
        return self._token_chars[self._bounds[index] : self._bounds[index + 1]]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        index %= len(self)
        part = slice(self._bounds[index], self._bounds[index + 1])
        item: dict[str, Any] = {"input_ids": self._ids[part].tolist(), "attention_mask": [1] * self.lengths[index]}
        if self._types is not None:
            item["token_type_ids"] = self._types[part].tolist()
        return item | {name: values[index].item() for name, values in self.targets.items()}


def encode(
    dataset: Dataset,
    spec: TaskSpec,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    training: bool,
    label_ids: Mapping[str, int],
) -> Encoded:
    """Tokenise a split in memory.

    Pairs are cut at `max_length` from the longer side; a span task's contexts go into overlapping windows (see
    `encode_spans`), and its questions are never cut.

    Args:
        dataset: a split of `load_task` or `hold_out`.
        tokenizer: the model's; a span task needs a fast one.
        max_length: tokens with the special ones, at most.
        training: for a span task, False keeps what `span_metrics` needs; otherwise the same.
        label_ids: label name to the model's output number, from `label_ids(spec, model.config.label2id)`.

    Raises:
        UserError: `max_length` out of range, a label without a number, or a question too long for `max_length`.
    """
    _check_length(tokenizer, max_length, len(spec.text_columns))
    if spec.kind == SPAN:
        windows = encode_spans(dataset, spec, tokenizer, max_length, keep_chars=not training)
        return Encoded(
            windows.lengths, windows.ids, windows.type_ids, windows.targets, windows.examples, windows.features,
            windows.token_chars, windows.cls_positions,
        )  # fmt: skip
    values = dataset[spec.label_column][:]
    if spec.kind == CLASSIFICATION:
        missing = [name for name in spec.label_names if name not in label_ids]
        if missing:
            raise UserError(f"label_ids: no number for {', '.join(missing)} (there are {', '.join(label_ids)})")
        numbers = [label_ids[name] for name in spec.label_names]
        targets = np.array([numbers[value] for value in values], np.int64)
    else:
        targets = np.array(values, np.float32)
    columns = [dataset[name][:] for name in spec.text_columns]
    lengths: list[int] = []
    ids: list[np.ndarray] = [np.empty(0, np.int32)]
    types: list[np.ndarray] = []
    for first in range(0, len(dataset), _ROWS_AT_ONCE):
        texts = [column[first : first + _ROWS_AT_ONCE] for column in columns]
        batch = tokenizer(*texts, truncation="longest_first", max_length=max_length, return_attention_mask=False)
        lengths += map(len, batch["input_ids"])
        ids.append(np.fromiter(chain.from_iterable(batch["input_ids"]), np.int32))
        if "token_type_ids" in batch:
            types.append(np.fromiter(chain.from_iterable(batch["token_type_ids"]), np.uint8))
    type_ids = np.concatenate(types) if types else None
    return Encoded(lengths, np.concatenate(ids), type_ids, {"labels": targets}, label_ids=label_ids)


def _check_length(tokenizer: PreTrainedTokenizerBase, max_length: int, texts: int) -> None:
    least = tokenizer.num_special_tokens_to_add(pair=texts == 2) + texts
    if max_length < least:
        raise UserError(f"max_length: expected at least {least} (special tokens and one a text), got {max_length}")
    if max_length > tokenizer.model_max_length:
        raise UserError(f"max_length: the model takes at most {tokenizer.model_max_length} tokens, got {max_length}")


class Collator:
    """Items of `Encoded` to a batch of tensors, padded on the right to the longest item.

    Lists become `[batch, longest]` int64 (`input_ids` padded with the tokenizer's padding token, `token_type_ids`
    with its padding type, `labels` with -100, everything else with 0); numbers become `[batch]`, int64 for integers,
    float32 for floats.
    It keeps a few numbers and not the tokenizer, so that workers get it cheaply.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None = None) -> None:
        if tokenizer.pad_token_id is None:
            raise UserError("tokenizer: it has no padding token; set tokenizer.pad_token")
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise UserError(f"pad_to_multiple_of: expected at least 1, got {pad_to_multiple_of}")
        ids, types = int(tokenizer.pad_token_id), int(tokenizer.pad_token_type_id)
        self.pads = {"input_ids": ids, "token_type_ids": types, "labels": -100}
        self.multiple = pad_to_multiple_of or 1

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if not features:
            raise UserError("features: expected at least one item, got none")
        longest = max(len(item["input_ids"]) for item in features)
        width = -(-longest // self.multiple) * self.multiple
        batch: dict[str, Tensor] = {}
        for name, first in features[0].items():
            values = [item[name] for item in features]
            if isinstance(first, (list, tuple)):
                pad = self.pads.get(name, 0)
                batch[name] = torch.tensor([[*row, *([pad] * (width - len(row)))] for row in values], dtype=torch.int64)
            else:
                real = isinstance(first, (float, np.floating))
                batch[name] = torch.tensor(values, dtype=torch.float32 if real else torch.int64)
        return batch
