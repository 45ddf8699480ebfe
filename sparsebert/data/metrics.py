"""GLUE's metrics for classes and numbers, on arrays; fractions, never percent, never NaN."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef

from sparsebert.data.tasks import CLASSIFICATION, REGRESSION, TaskSpec
from sparsebert.errors import UserError

__all__ = ["compute_metrics"]


def compute_metrics(
    spec: TaskSpec, logits: np.ndarray, labels: np.ndarray, label_ids: Mapping[str, int] | None = None
) -> dict[str, float]:
    """The metrics of `spec.metrics` by name.

    Accuracy, F1 of the positive class, macro-F1 over the classes present in labels or predictions, Matthews
    correlation, Pearson, Spearman (ties ranked by their mean), mean squared error; "combined" is the mean of the
    task's first two, as GLUE averages them. A correlation with a constant side is 0.

    Args:
        logits: `[N, classes]` for classification (the largest wins, the first of equals), `[N, 1]` or `[N]` for
            regression; any float dtype.
        labels: `[N]` integers (numbers of the model's outputs) or floats.
        label_ids: label name to output number, as `label_ids` gives it; default: the task's order. F1 needs it to
            find the positive class.

    Raises:
        ValueError: shapes that do not fit, no rows, logits that are not finite, or a span task.
    """
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if spec.kind not in (CLASSIFICATION, REGRESSION):
        raise UserError(f"task {spec.name} is scored by span_metrics, not compute_metrics")
    if labels.ndim != 1 or len(labels) == 0:
        raise UserError(f"labels: expected one a row and at least one, got shape {labels.shape}")
    fits = logits.ndim == 2 if spec.kind == CLASSIFICATION else logits.ndim == 1 or logits.shape[1:] == (1,)
    if not fits or len(logits) != len(labels):
        wanted = f"({len(labels)}, classes)" if spec.kind == CLASSIFICATION else f"({len(labels)}, 1)"
        raise UserError(f"logits: expected shape {wanted} for task {spec.name}, got {logits.shape}")
    bad = int((~np.isfinite(logits.reshape(len(labels), -1))).any(axis=1).sum())
    if bad:
        raise UserError(f"logits: {bad} of {len(labels)} rows are not finite; the model has diverged")
    scores: dict[str, float] = {}
    if spec.kind == CLASSIFICATION:
        labels = labels.astype(np.int64)
        if labels.min() < 0 or labels.max() >= logits.shape[1]:
            raise UserError(
                f"labels: expected 0 to {logits.shape[1] - 1} for {logits.shape[1]} outputs, "
                f"got {labels.min()} to {labels.max()}"
            )
        predicted = logits.argmax(axis=1)
        positive = _positive(spec, label_ids)
        for name in spec.metrics:
            scores[name] = _combined(spec, scores) if name == "combined" else _CLASS[name](labels, predicted, positive)
        return scores
    for name in spec.metrics:
        scores[name] = _combined(spec, scores) if name == "combined" else _NUMBER[name](labels, logits.reshape(-1))
    return scores


def _positive(spec: TaskSpec, label_ids: Mapping[str, int] | None) -> int:
    if spec.positive is None:
        return -1
    return label_ids[spec.positive] if label_ids else spec.label_names.index(spec.positive)


def _combined(spec: TaskSpec, scores: Mapping[str, float]) -> float:
    first, second = spec.metrics[:2]
    return (scores[first] + scores[second]) / 2


def _accuracy(labels: np.ndarray, predicted: np.ndarray, positive: int) -> float:
    return float((labels == predicted).mean())


def _f1(labels: np.ndarray, predicted: np.ndarray, positive: int) -> float:
    return float(f1_score(labels == positive, predicted == positive, zero_division=0.0))


def _macro_f1(labels: np.ndarray, predicted: np.ndarray, positive: int) -> float:
    return float(f1_score(labels, predicted, average="macro", zero_division=0.0))


def _matthews(labels: np.ndarray, predicted: np.ndarray, positive: int) -> float:
    # scikit-learn gives 0 where a side is constant, and warns when both are the same single class.
    constant = len(np.unique(labels)) == 1 or len(np.unique(predicted)) == 1
    return 0.0 if constant else float(matthews_corrcoef(labels, predicted))


def _pearson(labels: np.ndarray, predicted: np.ndarray) -> float:
    return 0.0 if _constant(labels, predicted) else float(stats.pearsonr(predicted, labels)[0])


def _spearman(labels: np.ndarray, predicted: np.ndarray) -> float:
    return 0.0 if _constant(labels, predicted) else float(stats.spearmanr(predicted, labels)[0])


def _mse(labels: np.ndarray, predicted: np.ndarray) -> float:
    return float(np.square(predicted - labels).mean())


def _constant(labels: np.ndarray, predicted: np.ndarray) -> bool:
    return bool(np.ptp(labels) == 0 or np.ptp(predicted) == 0)


_CLASS: dict[str, Callable[[np.ndarray, np.ndarray, int], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "matthews_correlation": _matthews,
}
_NUMBER: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "pearson": _pearson,
    "spearman": _spearman,
    "mse": _mse,
}
