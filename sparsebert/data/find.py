"""Which files under a folder are a task's splits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from sparsebert.data.read import ENDINGS
from sparsebert.data.tasks import TaskSpec
from sparsebert.errors import UserError

__all__ = ["find_splits"]

_SPLIT = re.compile(
    r"(?P<split>train|training|validation|valid|val|dev|eval|test)"
    r"(?:[-_](?P<part>matched|mismatched))?"
    r"(?:-v(?P<version>[12])\.\d)?"
    r"(?:-(?P<shard>\d{5})-of-(?P<shards>\d{5}))?",
    re.IGNORECASE,
)
_CANONICAL = {"training": "train", **dict.fromkeys(("valid", "val", "dev", "eval"), "validation")}
_LAYOUTS = (
    "DIR/{task}/train.EXT and validation.EXT, the same under DIR/glue/{task} or directly in DIR "
    "(also dev, valid, val; shards as train-00000-of-00002.EXT; EXT one of parquet, csv, tsv, jsonl, json)"
)


def find_splits(data_dir: Path, task: TaskSpec | None) -> dict[str, list[Path]]:
    """Files by split: "train", "validation", "mismatched" (MNLI), each a list of shards in order; absent ones left out.

    Args:
        data_dir: a folder, or one file, which counts as "train".
        task: the known task, whose own subfolder is looked for first; None for a custom one.

    Raises:
        UserError: nothing there, no split there, one split in two files, or a shard missing.
    """
    if data_dir.is_file():
        return {"train": [data_dir]}
    if not data_dir.exists():
        raise UserError(f"data_dir: {data_dir} does not exist")
    for folder in _folders(data_dir, task):
        found = _splits_in(folder, task)
        if set(found) - {"test"}:
            found.pop("test", None)
            return found
        if found:
            raise UserError(f"{folder}: there is a test split only, which is never used; a train split is needed")
    layouts = _LAYOUTS.format(task=task.name) if task else "DIR/train.EXT and DIR/validation.EXT, or one file"
    there = ", ".join(sorted(item.name for item in data_dir.iterdir())[:12]) or "nothing"
    what = f"data of task {task.name}" if task else "train or validation file"
    raise UserError(f"data_dir: no {what} in {data_dir}; expected {layouts}; there is {there}")


def _folders(data_dir: Path, task: TaskSpec | None) -> Iterator[Path]:
    """Folders that may hold the task's files, the most specific first."""
    if task is not None:
        for root in (data_dir, data_dir / "glue"):
            if root.is_dir():
                for child in sorted(root.iterdir()):
                    if child.is_dir() and _plain(child.name) == _plain(task.name):
                        yield from (child, child / "data", child / "plain_text")
        yield data_dir / "plain_text"
    yield from (data_dir, data_dir / "data")


def _plain(name: str) -> str:
    """GLUE's own folders are CoLA, SST-2, STS-B and so on; squad_v2 must stay apart from squad."""
    return name.lower().replace("-", "").replace("_", "")


def _splits_in(folder: Path, task: TaskSpec | None) -> dict[str, list[Path]]:
    found: dict[str, dict[tuple[str, str | None], list[tuple[int, Path]]]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _SPLIT.fullmatch(path.stem)
        if match is None or path.suffix.lower() not in ENDINGS or not path.is_file():
            continue
        version = match["version"]
        if version and task is not None and task.kind == "span" and (version == "2") != task.unanswerable:
            continue
        split = match["split"].lower()
        split = _CANONICAL.get(split, split)
        if (match["part"] or "").lower() == "mismatched":
            split = "mismatched" if split == "validation" else "test"
        series = (re.sub(r"-\d{5}-of", "-*-of", path.name), match["shards"])
        found.setdefault(split, {}).setdefault(series, []).append((int(match["shard"] or 0), path))
    # A test split counts only as "there is one": its labels are not public, and it is never read.
    return {split: [] if split == "test" else _one_series(folder, split, series) for split, series in found.items()}


def _one_series(folder: Path, split: str, series: dict[tuple[str, str | None], list[tuple[int, Path]]]) -> list[Path]:
    if len(series) > 1:
        names = ", ".join(name for name, _ in series)
        raise UserError(f"{folder}: the {split} split is there more than once ({names}); keep one of them")
    ((name, shards), files) = next(iter(series.items()))
    if shards is not None:
        missing = sorted(set(range(int(shards))) - {number for number, _ in files})
        if missing or len(files) != int(shards):
            lacks = f"lacks shard {', '.join(map(str, missing))}" if missing else "has shards beyond its total"
            raise UserError(f"{folder}: {name} {lacks}")
    return [path for _, path in sorted(files)]
