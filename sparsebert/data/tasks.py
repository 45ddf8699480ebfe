"""The known tasks: their columns, labels, metrics and official sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sparsebert.errors import UserError, unknown

__all__ = ["TASKS", "TaskSpec", "find_task"]

CLASSIFICATION, REGRESSION, SPAN = "classification", "regression", "span"


@dataclass(frozen=True)
class TaskSpec:
    """What a task asks for and how it is scored; knows nothing of where the data lie."""

    name: str
    """The word for `--task`, or "custom"."""
    kind: str
    """"classification", "regression" or "span" (the answer is a stretch of the context)."""
    text_columns: tuple[str, ...]
    """One or two column names; for "span" the question and the context."""
    label_column: str
    """The column with the label; for "span" the answers."""
    label_names: tuple[str, ...]
    """Class names, in the order of the integers in the data; () for regression and span."""
    metric: str
    """The primary metric: one of `metrics`."""
    metrics: tuple[str, ...] = ()
    """Every metric reported, fractions (not percent)."""
    positive: str | None = None
    """The class that "f1" is about; None where f1 is not reported."""
    value_range: tuple[float, float] | None = None
    """Regression: the lowest and the highest possible value, if known."""
    unanswerable: bool = False
    """Span: whether a question may have no answer (SQuAD 2.0)."""
    hub: tuple[str, str | None] | None = None
    """Dataset and configuration on the Hugging Face hub."""
    official_rows: tuple[tuple[str, int], ...] = ()
    """Official row counts by split ("train", "validation", "mismatched")."""

    @property
    def is_pair(self) -> bool:
        """Whether an input is two texts."""
        return len(self.text_columns) == 2

    @property
    def num_labels(self) -> int:
        """Outputs a model's head needs: classes, 1 for regression, 2 (start and end) for span."""
        return {CLASSIFICATION: len(self.label_names), REGRESSION: 1, SPAN: 2}[self.kind]


def _glue(
    name: str,
    texts: Sequence[str],
    labels: Sequence[str],
    metric: str,
    rows: Sequence[int],
    positive: str | None = None,
) -> TaskSpec:
    more = {"f1": ("accuracy", "f1", "combined"), "matthews_correlation": (metric, "accuracy")}
    return TaskSpec(
        name, CLASSIFICATION, tuple(texts), "label", tuple(labels), metric,
        more["f1"] if positive else more.get(metric, (metric,)), positive=positive, hub=("nyu-mll/glue", name),
        official_rows=tuple(zip(("train", "validation", "mismatched"), rows, strict=False)),
    )  # fmt: skip


_PAIR = ("sentence1", "sentence2")
_STSB = TaskSpec(
    "stsb", REGRESSION, _PAIR, "label", (), "spearman", ("spearman", "pearson", "combined"),
    value_range=(0.0, 5.0), hub=("nyu-mll/glue", "stsb"), official_rows=(("train", 5749), ("validation", 1500)),
)  # fmt: skip


def _squad(name: str, unanswerable: bool, train: int, validation: int) -> TaskSpec:
    more = ("has_answer_f1", "has_answer_exact_match", "no_answer_accuracy") if unanswerable else ()
    return TaskSpec(
        name, SPAN, ("question", "context"), "answers", (), "f1", ("f1", "exact_match", *more),
        unanswerable=unanswerable, hub=(f"rajpurkar/{name}", None),
        official_rows=(("train", train), ("validation", validation)),
    )  # fmt: skip


def _demo(name: str, train: int, validation: int) -> TaskSpec:
    return TaskSpec(
        name, CLASSIFICATION, ("text",), "label", ("negative", "positive"), "accuracy", ("accuracy",),
        official_rows=(("train", train), ("validation", validation)),
    )  # fmt: skip


# Sizes, columns and label orders are those of `nyu-mll/glue`, `rajpurkar/squad` and `rajpurkar/squad_v2`.
# GLUE reports accuracy and F1 for MRPC and QQP, Pearson and Spearman for STS-B; "combined" is their mean.
TASKS: dict[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        _glue("cola", ("sentence",), ("unacceptable", "acceptable"), "matthews_correlation", (8551, 1043)),
        _glue("sst2", ("sentence",), ("negative", "positive"), "accuracy", (67349, 872)),
        _glue("mrpc", _PAIR, ("not_equivalent", "equivalent"), "f1", (3668, 408), positive="equivalent"),
        _STSB,
        _glue("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), "accuracy", (363846, 40430),
              positive="duplicate"),
        _glue("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), "accuracy",
              (392702, 9815, 9832)),
        _glue("qnli", ("question", "sentence"), ("entailment", "not_entailment"), "accuracy", (104743, 5463)),
        _glue("rte", _PAIR, ("entailment", "not_entailment"), "accuracy", (2490, 277)),
        _glue("wnli", _PAIR, ("not_entailment", "entailment"), "accuracy", (635, 71)),
        _squad("squad", False, 87599, 10570),
        _squad("squad_v2", True, 130319, 11873),
        _demo("demo", 7530, 1000),
        _demo("demo_imdb", 24000, 1000),
    )
}  # fmt: skip


def custom_task(
    name: str, kind: str, text_columns: Sequence[str], label_column: str, label_names: Sequence[str] = ()
) -> TaskSpec:
    """The spec of a task the user describes: accuracy and macro-F1 for classes, the correlations for numbers."""
    metrics = ("accuracy", "macro_f1") if kind == CLASSIFICATION else ("spearman", "pearson", "combined", "mse")
    return TaskSpec(name, kind, tuple(text_columns), label_column, tuple(label_names), metrics[0], metrics)


def find_task(name: str, text_columns: Sequence[str] | None = None, label_column: str | None = None) -> TaskSpec | None:
    """The known task of that name with the given column names put in, or None for a task to be read from the data.

    Raises:
        UserError: an unknown name without columns, or a number of columns that does not fit the task.
    """
    if text_columns is not None and not 1 <= len(text_columns) <= 2:
        raise UserError(f"text_columns: expected one or two column names, got {len(text_columns)}")
    if text_columns is not None and len(set(text_columns)) != len(text_columns):
        raise UserError(f"text_columns: {text_columns[0]!r} is named twice")
    spec = TASKS.get(name)
    if spec is None:
        if text_columns is None:
            if name == "custom":
                raise UserError("a custom task needs --text-columns (one or two) and --label-column, and --data-dir")
            raise unknown("task", name, [*TASKS, "custom"])
        return None
    if (spec.kind == SPAN or spec.hub is None) and (text_columns or label_column):
        columns = ", ".join((*spec.text_columns, spec.label_column))
        raise UserError(f"task {name} has fixed columns ({columns}): give no column names")
    if text_columns is not None and len(text_columns) != len(spec.text_columns):
        raise UserError(
            f"text_columns: task {name} takes {len(spec.text_columns)} ({', '.join(spec.text_columns)}), "
            f"got {len(text_columns)} ({', '.join(text_columns)})"
        )
    return replace(
        spec,
        text_columns=tuple(text_columns) if text_columns else spec.text_columns,
        label_column=label_column or spec.label_column,
    )
