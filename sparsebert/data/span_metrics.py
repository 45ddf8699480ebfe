"""SQuAD's exact match and F1, with the official normalisation, from start and end logits."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from sparsebert.data.encode import Encoded
from sparsebert.data.tasks import TaskSpec
from sparsebert.errors import UserError

__all__ = ["exact_match", "normalise", "span_metrics", "span_predictions", "token_f1"]

N_BEST = 20
MAX_ANSWER_TOKENS = 30

_ARTICLES = re.compile(r"\b(a|an|the)\b")
Logits = np.ndarray | Sequence[np.ndarray]
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case without punctuation, articles and extra blanks, as the official SQuAD script has it."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    """1 if the two are equal after `normalise`, else 0."""
    return float(normalise(prediction) == normalise(answer))


def token_f1(prediction: str, answer: str, unanswerable: bool = False) -> float:
    """F1 of the shared words (with repeats) after `normalise`.

    With an empty side it is 0 in SQuAD 1.1's script; in 2.0's (`unanswerable`) 1 if both are empty.
    """
    predicted, accepted = normalise(prediction).split(), normalise(answer).split()
    if unanswerable and not (predicted and accepted):
        return float(predicted == accepted)
    shared = sum((Counter(predicted) & Counter(accepted)).values())
    return 2 * shared / (len(predicted) + len(accepted)) if shared else 0.0


def span_metrics(encoded: Encoded, start_logits: Logits, end_logits: Logits, spec: TaskSpec) -> dict[str, float]:
    """Exact match and F1 over the questions, the best over each question's accepted answers.

    For SQuAD 2.0 also both over the questions that have an answer, and the share of the others left unanswered
    (0 where there are none such).

    Args:
        encoded: from `encode(..., training=False)`.
        start_logits: `[windows, >= longest]`, or one row of its own length per window; what lies beyond a window's
            tokens is not read.
        end_logits: the same.

    Raises:
        ValueError: shapes that do not fit, logits that are not finite, or data encoded for training.
    """
    predictions = span_predictions(encoded, start_logits, end_logits, spec)
    scores = np.array([_score(p, e.answers, spec) for p, e in zip(predictions, encoded.examples, strict=True)])
    result = {"f1": float(scores[:, 1].mean()), "exact_match": float(scores[:, 0].mean())}
    if spec.unanswerable:
        has = np.array([bool(example.answers) for example in encoded.examples])
        result["has_answer_f1"] = float(scores[has, 1].mean()) if has.any() else 0.0
        result["has_answer_exact_match"] = float(scores[has, 0].mean()) if has.any() else 0.0
        result["no_answer_accuracy"] = float(scores[~has, 0].mean()) if not has.all() else 0.0
    return result


def span_predictions(encoded: Encoded, start_logits: Logits, end_logits: Logits, spec: TaskSpec) -> list[str]:
    """The predicted answer of each row of the data; "" for none.

    Of the 20 best starts and 20 best ends inside the context of each window, the pair with the highest sum that
    is in order and at most 30 tokens long; over all windows the highest. In SQuAD 2.0 "" wins if its score, the
    lowest sum at CLS over the windows, is higher. Of equals the first wins.

    Raises:
        ValueError: as `span_metrics`.
    """
    start_rows, end_rows = _rows(encoded, start_logits, "start_logits"), _rows(encoded, end_logits, "end_logits")
    count = len(encoded.examples)
    best, null = np.full(count, -np.inf), np.full(count, np.inf)
    texts = [""] * count
    features, cls_positions = encoded.features, encoded.cls_positions
    for window in range(len(encoded)):
        row = int(features[window]) if features is not None else 0
        cls = int(cls_positions[window]) if cls_positions is not None else 0
        starts, ends = start_rows[window], end_rows[window]
        null[row] = min(null[row], starts[cls] + ends[cls])
        chars = encoded.token_chars(window)
        score, first, last = _best_span(starts, ends, np.flatnonzero(chars[:, 0] >= 0))
        if score > best[row]:
            best[row] = score
            texts[row] = encoded.examples[row].context[chars[first, 0] : chars[last, 1]]
    if spec.unanswerable:
        texts = ["" if null[row] > best[row] else text for row, text in enumerate(texts)]
    return texts


def _best_span(starts: np.ndarray, ends: np.ndarray, inside: np.ndarray) -> tuple[float, int, int]:
    if len(inside) == 0:
        return -np.inf, 0, 0
    first = inside[np.argsort(-starts[inside], kind="stable")[:N_BEST]]
    last = inside[np.argsort(-ends[inside], kind="stable")[:N_BEST]]
    length = last[None, :] - first[:, None] + 1
    scores = np.where((length >= 1) & (length <= MAX_ANSWER_TOKENS), starts[first][:, None] + ends[last], -np.inf)
    row, column = np.unravel_index(int(scores.argmax()), scores.shape)
    return float(scores[row, column]), int(first[row]), int(last[column])


def _score(prediction: str, answers: Sequence[str], spec: TaskSpec) -> tuple[float, float]:
    if spec.unanswerable:
        answers = [answer for answer in answers if normalise(answer)]
    answers = answers or [""]
    return (
        max(exact_match(prediction, answer) for answer in answers),
        max(token_f1(prediction, answer, spec.unanswerable) for answer in answers),
    )


def _rows(encoded: Encoded, logits: Logits, name: str) -> list[np.ndarray]:
    """One float64 row per window, cut to the window's tokens; checked."""
    if encoded.features is None or not encoded.examples:
        raise UserError("encoded: expected the windows of a span task with at least one row")
    if len(logits) != len(encoded):
        raise UserError(f"{name}: expected one row for each of {len(encoded)} windows, got {len(logits)}")
    rows: list[np.ndarray] = []
    bad = 0
    for window, length in enumerate(encoded.lengths):
        row = np.asarray(logits[window], np.float64)
        if row.ndim != 1 or len(row) < length:
            raise UserError(f"{name}: expected {length} or more values for window {window}, got shape {row.shape}")
        rows.append(row[:length])
        bad += not np.isfinite(rows[-1]).all()
    if bad:
        raise UserError(f"{name}: {bad} of {len(encoded)} windows are not finite; the model has diverged")
    return rows
