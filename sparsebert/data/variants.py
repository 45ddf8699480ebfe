"""Variants of a task's training rows: fewer of them, unbalanced classes, wrong labels.

They are drawn with a seed of their own, so that every run of a comparison sees the same rows and the same wrong labels
whatever its own seed, and with NumPy's `RandomState`, whose streams are the same on every machine and in every release.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from sparsebert.data.split import sample
from sparsebert.data.tasks import CLASSIFICATION, TaskSpec
from sparsebert.errors import UserError

__all__ = ["Variant", "apply_variant"]

# One stream for each kind of draw (few-samples has the seed's own), so that one setting does not move another's draws.
_IMBALANCE_STREAM, _NOISE_STREAM = 1, 2
_HIGHEST_SEED = 2**32 - 1  # NumPy's


@dataclass(frozen=True)
class Variant:
    """What is done to a train split, in this order: imbalance, few samples, label noise.

    Raises:
        UserError: a number that no data could fit, by name.
    """

    few_samples: int | None = None
    """Keep this many random rows (not stratified; a smaller number keeps a part of what a larger one keeps)."""
    label_noise: float = 0.0
    """Each label becomes another class with this probability, uniformly among the others. A higher probability keeps
    the wrong labels of a lower one and adds to them."""
    imbalance: float | None = None
    """Most frequent class to rarest class: class sizes fall geometrically from the most frequent class, in the order
    of their frequency; a class that is rarer already is left as it is."""
    seed: int = 0
    """Of all three; apart from a run's."""

    def __post_init__(self) -> None:
        if self.few_samples is not None and self.few_samples < 1:
            raise UserError(f"few_samples: expected at least 1, got {self.few_samples}")
        # Written so that NaN fails too.
        if not 0.0 <= self.label_noise < 1.0:
            raise UserError(f"label_noise: expected a probability of at least 0 and below 1, got {self.label_noise:g}")
        if self.imbalance is not None and not 1.0 <= self.imbalance < math.inf:
            raise UserError(
                f"imbalance: expected at least 1 (rows of the most frequent class to one of the rarest), "
                f"got {self.imbalance:g}"
            )
        if not 0 <= self.seed <= _HIGHEST_SEED:
            raise UserError(f"variant_seed: expected 0 to {_HIGHEST_SEED}, got {self.seed}")

    def __bool__(self) -> bool:
        """Whether anything is changed."""
        return self.few_samples is not None or self.label_noise > 0 or self.imbalance is not None


def apply_variant(train: Dataset, spec: TaskSpec, variant: Variant) -> tuple[Dataset, str, dict[str, Any]]:
    """The changed training rows, a note for readers of a result, and what was done as plain values.

    Args:
        train: with class numbers, floats or answers as labels, as `TaskData.train` has them.
        spec: of its task.
        variant: what to do; one that changes nothing gives the rows back, an empty note and no values.

    Returns:
        The rows; the note; `{"seed", "rows", ...}` with the rows kept, for each part what was asked and what it left
        ("imbalance", "few_samples", "label_noise" with the number of labels flipped), and for a classification task
        the rows of each class at the end.

    Raises:
        UserError: imbalance or noise for a task without classes; more samples than there are rows; a class that would
            be left without a row.
    """
    if not variant:
        return train, "", {}
    for name in ("imbalance", "label_noise"):
        if getattr(variant, name) and spec.kind != CLASSIFICATION:
            raise UserError(f"{name}: task {spec.name} is {spec.kind} and has no classes; leave it out")
    notes: list[str] = []
    done: dict[str, Any] = {"seed": variant.seed}
    if variant.imbalance is not None:
        before = len(train)
        train = _imbalanced(train, spec, variant.imbalance, variant.seed)
        done["imbalance"] = {"ratio": variant.imbalance, "rows": len(train)}
        notes.append(f"imbalance {variant.imbalance:g} left {len(train):,} of {before:,}")
    if variant.few_samples is not None:
        before = len(train)
        train = _fewer(train, spec, variant.few_samples, variant.seed)
        done["few_samples"] = {"of": before, "rows": len(train)}
        notes.append(f"{len(train):,} of {before:,} were drawn at random")
    if variant.label_noise:
        train, flipped = _noisy(train, spec, variant.label_noise, variant.seed)
        done["label_noise"] = {"probability": variant.label_noise, "flipped": flipped}
        notes.append(f"{flipped:,} of {len(train):,} labels were flipped (label noise {variant.label_noise:g})")
    done["rows"] = len(train)
    if spec.kind == CLASSIFICATION:
        done["classes"] = _class_rows(train, spec)
    return train, f"training rows changed with variant seed {variant.seed}: {', then '.join(notes)}", done


def _imbalanced(train: Dataset, spec: TaskSpec, ratio: float, seed: int) -> Dataset:
    labels = np.asarray(train[spec.label_column][:], np.int64)
    sizes = Counter(labels.tolist())
    order = sorted(sizes, key=lambda number: (-sizes[number], number))
    if len(order) < 2:
        raise UserError(f"imbalance: the {len(labels):,} training rows are of one class; two or more are needed")
    kept: list[np.ndarray] = []
    for place, number in enumerate(order):
        target = sizes[order[0]] * ratio ** (-place / (len(order) - 1))
        # A class of its own stream: what is kept of it does not depend on the others.
        rows = np.flatnonzero(labels == number)
        shuffled = np.random.RandomState([seed, _IMBALANCE_STREAM, number]).permutation(rows)
        kept.append(shuffled[: min(len(rows), round(target))])
    return _all_classes_left(
        train.select(np.sort(np.concatenate(kept)).tolist()), train, spec, f"imbalance {ratio:g}", "a smaller ratio"
    )


def _fewer(train: Dataset, spec: TaskSpec, count: int, seed: int) -> Dataset:
    if count > len(train):
        raise UserError(f"few_samples: there are {len(train):,} training rows, got {count:,}; leave it out to take all")
    fewer = sample(train, count, seed, "few_samples")
    return _all_classes_left(fewer, train, spec, f"few_samples {count}", "more samples, or another variant_seed")


def _noisy(train: Dataset, spec: TaskSpec, probability: float, seed: int) -> tuple[Dataset, int]:
    """The rows with labels flipped, and how many were."""
    stream = np.random.RandomState([seed, _NOISE_STREAM])
    labels, classes = np.asarray(train[spec.label_column][:], np.int64), spec.num_labels
    if classes < 2:
        raise UserError(f"label_noise: task {spec.name} has one class, and no other to flip a label to")
    flipped = stream.random_sample(len(labels)) < probability
    # Drawn for every row, flipped or not: the same row gets the same wrong label at every probability.
    shift = 1 + (stream.random_sample(len(labels)) * (classes - 1)).astype(np.int64)
    columns = {name: train[name][:] for name in train.column_names}
    columns[spec.label_column] = np.where(flipped, (labels + shift) % classes, labels).tolist()
    noisy = Dataset.from_dict(columns, features=train.features)
    noisy = _all_classes_left(noisy, train, spec, f"label_noise {probability:g}", "less noise, or another variant_seed")
    return noisy, int(flipped.sum())


def _all_classes_left(now: Dataset, before: Dataset, spec: TaskSpec, what: str, instead: str) -> Dataset:
    if spec.kind == CLASSIFICATION:
        had, has = _class_rows(before, spec), _class_rows(now, spec)
        gone = [name for name in had if had[name] and not has[name]]
        if gone:
            raise UserError(
                f"{what}: would leave no training row of {', '.join(gone)} (there are "
                f"{', '.join(f'{had[name]:,}' for name in gone)} of {len(before):,}); choose {instead}"
            )
    return now


def _class_rows(rows: Dataset, spec: TaskSpec) -> dict[str, int]:
    """Rows of each class, by its name."""
    sizes = Counter(rows[spec.label_column][:])
    return {name: sizes[number] for number, name in enumerate(spec.label_names)}
