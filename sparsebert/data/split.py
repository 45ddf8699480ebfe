"""Deterministic splits and samples of a dataset."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from datasets import Dataset

from sparsebert.data.tasks import CLASSIFICATION, SPAN, TaskSpec
from sparsebert.errors import UserError

__all__ = ["held_out_rows", "hold_out", "input_keys", "sample"]


def input_keys(dataset: Dataset, spec: TaskSpec) -> list[str]:
    """One string per row, equal for rows whose input is the same: all texts; for a span task the context alone."""
    columns = ("context",) if spec.kind == SPAN else spec.text_columns
    texts = [dataset[column][:] for column in columns]
    return list(texts[0]) if len(texts) == 1 else ["\x1f".join(row) for row in zip(*texts, strict=True)]


def held_out_rows(
    keys: Sequence[str], strata: Sequence[Hashable], wanted: Mapping[Hashable, int], salt: str = ""
) -> list[int]:
    """Row numbers to hold out, ascending: per stratum `wanted` rows, those whose key has the smallest SHA-256.

    Rows with equal keys go together (their stratum is the first one's); a group too large for what is still
    wanted is passed over. The choice depends on the texts alone: not on row order, not on a library's generator.
    """
    groups: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    order = sorted(groups, key=lambda key: hashlib.sha256((salt + key).encode("utf-8", "surrogatepass")).digest())
    left = dict(wanted)
    held: list[int] = []
    for key in order:
        rows = groups[key]
        stratum = strata[rows[0]]
        if left.get(stratum, 0) >= len(rows):
            held.extend(rows)
            left[stratum] -= len(rows)
    return sorted(held)


def hold_out(train: Dataset, spec: TaskSpec, fraction: float = 0.1, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split `train` into (train, held-out), the same way every time for the same texts and seed.

    Classification: stratified, each class gives `fraction` of its rows (rounded, and at least one where it has
    two or more). Rows with the same input (for span: the same context) never fall on both sides. Order is kept.

    Raises:
        UserError: `fraction` not in (0, 1), or so few distinct inputs that one side would be empty.
    """
    if not 0.0 < fraction < 1.0:
        raise UserError(f"fraction: expected a number between 0 and 1, got {fraction}")
    keys = input_keys(train, spec)
    strata = train[spec.label_column][:] if spec.kind == CLASSIFICATION else [0] * len(keys)
    wanted: dict[Hashable, int] = {
        stratum: min(max(1, round(fraction * count)), count - 1) for stratum, count in Counter(strata).items()
    }
    held = held_out_rows(keys, strata, wanted, salt=f"{seed}\x1f")
    if not held or len(held) == len(keys):
        raise UserError(
            f"cannot hold out {fraction:.0%} of {len(keys)} rows with {len(set(keys))} distinct inputs: "
            "give a validation file, or more rows"
        )
    kept = np.setdiff1d(np.arange(len(keys)), held)
    return train.select(kept.tolist()), train.select(held)


def sample(dataset: Dataset, count: int | None, seed: int, argument: str) -> Dataset:
    """`count` rows in a shuffled order (a smaller count gives a prefix); all, unshuffled, if there are no more.

    Raises:
        UserError: `count` below 1, naming `argument`.
    """
    if count is None:
        return dataset
    if count < 1:
        raise UserError(f"{argument}: expected at least 1, got {count}")
    if count >= len(dataset):
        return dataset
    # RandomState's streams are frozen by NumPy's compatibility policy; default_rng's are not.
    return dataset.select(np.random.RandomState(seed).permutation(len(dataset))[:count].tolist())
