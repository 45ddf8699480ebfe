"""SQuAD-like rows to windows of tokens with start and end positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sparsebert.data.tasks import TaskSpec
from sparsebert.errors import UserError

__all__ = ["DOC_STRIDE", "SpanExample", "Windows", "check_answers", "encode_spans"]

DOC_STRIDE = 128
"""Tokens that neighbouring windows of one context share (what Hugging Face's run_qa calls doc_stride)."""

_LEAST_ROOM = 8
_ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class SpanExample:
    """A question's context and accepted answers, for scoring."""

    id: str
    context: str
    answers: tuple[str, ...]


@dataclass
class Windows:
    """What `Encoded` takes: one entry per window, in the order of the rows; tokens of all windows end to end."""

    lengths: list[int]
    ids: np.ndarray
    type_ids: np.ndarray | None
    targets: dict[str, np.ndarray]
    examples: list[SpanExample]
    features: np.ndarray
    token_chars: np.ndarray | None
    cls_positions: np.ndarray


def check_answers(
    values: Sequence[Any], contexts: Sequence[str], spec: TaskSpec, where: str
) -> list[dict[str, list[Any]]]:
    """The answers column in one form: `{"text": [...], "answer_start": [...]}` per row.

    Raises:
        UserError: an answer of another shape, one that is not in the context where it says, or a question without
            an answer in a task that has none such.
    """
    column = spec.label_column
    found: list[dict[str, list[Any]]] = []
    for row, (value, context) in enumerate(zip(values, contexts, strict=True)):
        place = f"{where}: row {row + 1}, column {column!r}"
        if not isinstance(value, Mapping) or not {"text", "answer_start"} <= set(value):
            raise UserError(f"{place}: expected an object with the lists 'text' and 'answer_start', got {value!r:.80}")
        texts, starts = value["text"], value["answer_start"]
        lists = isinstance(texts, (list, tuple)) and isinstance(starts, (list, tuple)) and len(texts) == len(starts)
        if not lists:
            raise UserError(f"{place}: 'text' and 'answer_start' must be lists of one length, got {value!r:.80}")
        if not texts and not spec.unanswerable:
            raise UserError(f"{place}: the question has no answer; use --task squad_v2 for data with such questions")
        for text, start in zip(texts, starts, strict=True):
            if not isinstance(text, str) or not isinstance(start, int):
                raise UserError(f"{place}: expected text and an integer, got {text!r:.40} and {start!r:.40}")
            if start < 0 or context[start : start + len(text)] != text:
                raise UserError(f"{place}: the answer {text!r:.60} is not at character {start} of the context")
        found.append({"text": list(texts), "answer_start": list(starts)})
    return found


def encode_spans(
    dataset: Dataset, spec: TaskSpec, tokenizer: PreTrainedTokenizerBase, max_length: int, *, keep_chars: bool
) -> Windows:
    """Question and context to windows of at most `max_length` tokens; neighbouring windows share `DOC_STRIDE` tokens.

    The question is never cut. Where it leaves little room, windows share at most half of the room. A window that
    does not hold the whole first answer, and a question without one, has start and end at the CLS token.

    Raises:
        UserError: the tokenizer is not a fast one, or a question leaves less than 8 tokens for the context.
    """
    if not tokenizer.is_fast:
        raise UserError("a span task needs a fast tokenizer (one with a tokenizer.json): it gives character positions")
    questions, contexts = (dataset[name][:] for name in spec.text_columns)
    answers = dataset[spec.label_column][:]
    ids = dataset["id"][:] if "id" in dataset.column_names else [str(row) for row in range(len(dataset))]
    examples = [
        SpanExample(str(one), context, tuple(answer["text"]))
        for one, context, answer in zip(ids, contexts, answers, strict=True)
    ]
    windows = _windows(questions, contexts, tokenizer, max_length)
    places = np.empty((len(windows), 3), np.int64)
    for number, window in enumerate(windows):
        at = np.flatnonzero(window.ids == tokenizer.cls_token_id)
        cls = int(at[0]) if len(at) else 0
        places[number] = (cls, *_answer_tokens(window.chars, answers[window.row], cls))
    types = [window.type_ids for window in windows if window.type_ids is not None]
    return Windows(
        lengths=[len(window.ids) for window in windows],
        ids=np.concatenate([np.empty(0, np.int32), *(window.ids for window in windows)]),
        type_ids=np.concatenate(types) if types else None,
        targets={"start_positions": places[:, 1].copy(), "end_positions": places[:, 2].copy()},
        examples=examples,
        features=np.array([window.row for window in windows], np.int32),
        token_chars=np.concatenate([np.empty((0, 2), np.int32), *(w.chars for w in windows)]) if keep_chars else None,
        cls_positions=places[:, 0].copy(),
    )


@dataclass(frozen=True)
class _Window:
    row: int
    ids: np.ndarray
    type_ids: np.ndarray | None
    chars: np.ndarray
    """`[tokens, 2]` characters in the context, -1 outside it."""


def _windows(
    questions: Sequence[str], contexts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[_Window]:
    """Every window, in the order of the rows."""
    special = tokenizer.num_special_tokens_to_add(pair=True)
    found: list[_Window] = []
    for first in range(0, len(questions), _ROWS_AT_ONCE):
        rows = range(first, min(first + _ROWS_AT_ONCE, len(questions)))
        plain = tokenizer([questions[row] for row in rows], add_special_tokens=False, return_attention_mask=False)
        by_stride: dict[int, list[int]] = {}
        for row, tokens in zip(rows, plain["input_ids"], strict=True):
            room = max_length - special - len(tokens)
            if room < _LEAST_ROOM:
                raise UserError(
                    f"max_length: the question of row {row + 1} has {len(tokens)} tokens and leaves {max(room, 0)} of "
                    f"{max_length} for its context; {len(tokens) + special + _LEAST_ROOM} or more are needed"
                )
            by_stride.setdefault(min(DOC_STRIDE, room // 2), []).append(row)
        part: list[_Window] = []
        for stride, chosen in by_stride.items():
            part += _same_stride(chosen, questions, contexts, tokenizer, max_length, stride)
        found += sorted(part, key=lambda window: window.row)  # stable: the windows of a row stay in order
    return found


def _same_stride(
    rows: Sequence[int],
    questions: Sequence[str],
    contexts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int,
) -> list[_Window]:
    batch = tokenizer(
        [questions[row] for row in rows],
        [contexts[row] for row in rows],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    found: list[_Window] = []
    for window, which in enumerate(batch["overflow_to_sample_mapping"]):
        chars = np.array(batch["offset_mapping"][window], np.int32)
        chars[[side != 1 for side in batch.sequence_ids(window)]] = -1
        types = np.array(batch["token_type_ids"][window], np.uint8) if "token_type_ids" in batch else None
        found.append(_Window(rows[which], np.array(batch["input_ids"][window], np.int32), types, chars))
    return found


def _answer_tokens(chars: np.ndarray, answer: Mapping[str, Sequence[Any]], cls: int) -> tuple[int, int]:
    """First and last token of the first answer, or the CLS token twice if the window does not hold all of it."""
    inside = np.flatnonzero(chars[:, 0] >= 0)
    if not answer["text"] or len(inside) == 0:
        return cls, cls
    text = answer["text"][0]
    # Blanks around an answer belong to no token.
    start = answer["answer_start"][0] + len(text) - len(text.lstrip())
    end = start + len(text.strip())
    first, last = int(inside[0]), int(inside[-1])
    if end <= start or chars[first, 0] > start or chars[last, 1] < end:
        return cls, cls
    starts, ends = chars[first : last + 1, 0], chars[first : last + 1, 1]
    return (
        first + int(np.searchsorted(starts, start, side="right")) - 1,
        first + int(np.searchsorted(ends, end, side="left")),
    )
