"""Loading a task: from a folder or file, from the hub, or from the demo's package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value

from sparsebert.data.demo import DEMO_TASKS, demo_columns
from sparsebert.data.digest import sha256_file
from sparsebert.data.find import find_splits
from sparsebert.data.labels import class_numbers, infer_classes, numbers, typed
from sparsebert.data.read import UNTYPED, Columns, check_texts, class_words, read_columns
from sparsebert.data.spans import check_answers
from sparsebert.data.split import hold_out, input_keys, sample
from sparsebert.data.tasks import CLASSIFICATION, REGRESSION, SPAN, TASKS, TaskSpec, custom_task, find_task
from sparsebert.data.variants import Variant, apply_variant
from sparsebert.errors import UserError

__all__ = ["TaskData", "load_task"]

# Original GLUE column names by the name `nyu-mll/glue` gives them.
_ORIGINAL_NAMES = {
    "mrpc": {"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
    "qqp": {"label": "is_duplicate"},
    "mnli": {"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
    "stsb": {"label": "score"},
}
_COLA_HEADER = ("source", "label", "star", "sentence")


@dataclass
class TaskData:
    """A task's data: text columns as strings; the label column as class number, float, or `{text, answer_start}`."""

    spec: TaskSpec
    train: Dataset
    """Rows to train on; no rows if `load_task` was called with `require_train=False` and there are none."""
    validation: Dataset
    """What results are reported on; never used to choose anything (use `hold_out` on `train` for that)."""
    extra_validation: dict[str, Dataset] = field(default_factory=dict)
    """Further splits to report on: "mismatched" for MNLI."""
    note: str = ""
    """What a reader of a result must know of the data: how they were split, sizes that are not the official ones."""
    fingerprint: dict[str, object] = field(default_factory=dict)
    """Plain values that name the data: per split the files with SHA-256 and rows, the sampling, the split and what a
    variant changed."""


@dataclass
class _Split:
    """One split as read, before labels are understood."""

    columns: Columns
    where: str
    files: list[dict[str, object]]

    @property
    def rows(self) -> int:
        return len(next(iter(self.columns.values())))


def load_task(
    name: str,
    data_dir: str | Path | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    *,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
    require_train: bool = True,
    kind: str | None = None,
    variant: Variant | None = None,
) -> TaskData:
    """A task's train and validation data, checked.

    Args:
        name: a task of `TASKS`, or "custom" (or any other word) for the columns named here.
        data_dir: a folder or file; None loads a GLUE or SQuAD task from the hub, and the demo from its package.
        text_columns: one or two columns with text. Required for a custom task.
        label_column: its default is "label". Custom: text, integers, booleans are classes; floats are numbers,
            unless whole with at most 20 distinct values.
        max_train_samples: keep a random sample of this many training rows.
        max_eval_samples: the same for each validation split.
        seed: of the sampling and of splitting; the data's own seed, apart from a run's.
        require_train: False accepts data without a train split, for evaluation only.
        kind: "classification" or "regression" to override what a custom label column looks like.
        variant: what to change of the train split, and of no other, before `max_train_samples` are taken.

    Raises:
        UserError: whatever is wrong with the data, naming file, column and rows, and what to do.
    """
    if isinstance(text_columns, str):
        text_columns = (text_columns,)
    spec = find_task(name, text_columns, label_column)
    notes: list[str] = []
    fingerprint: dict[str, object] = {"task": name}
    if name in DEMO_TASKS:
        splits = _from_demo(name, data_dir, notes, fingerprint)
    elif data_dir is None:
        splits = _from_hub(spec, fingerprint)
    else:
        splits = _from_files(Path(data_dir).expanduser(), spec, text_columns or (), label_column or "label", notes)
    for split, content in splits.items():
        for column in spec.text_columns if spec else text_columns or ():
            check_texts(content.columns[column], content.where, column)
        if content.files:
            fingerprint[split] = content.files
    if require_train and "train" not in splits:
        raise UserError(
            f"task {name} has no train split in {data_dir}: found {', '.join(splits)} only; "
            "training needs a train file there (evaluating does not)"
        )
    if spec is None:
        spec = _custom_spec(name, splits, text_columns or (), label_column or "label", kind, notes)
    elif kind is not None and kind != spec.kind:
        raise UserError(f"kind: task {name} is {spec.kind}, got {kind!r}")
    datasets = {split: _dataset(content, spec) for split, content in splits.items()}
    if spec.kind == CLASSIFICATION and "train" in datasets:
        _refuse_one_class(datasets["train"], spec, splits["train"].where)
    return _finish(spec, datasets, notes, fingerprint, max_train_samples, max_eval_samples, seed, variant)


def _finish(
    spec: TaskSpec,
    datasets: dict[str, Dataset],
    notes: list[str],
    fingerprint: dict[str, object],
    max_train_samples: int | None,
    max_eval_samples: int | None,
    seed: int,
    variant: Variant | None,
) -> TaskData:
    """Split off what is missing, sample, and gather the notes."""
    _size_notes(spec, datasets, notes)
    if "validation" not in datasets:
        if "mismatched" in datasets and "train" not in datasets:
            raise UserError(f"task {spec.name}: only validation_mismatched was found; validation_matched is needed")
        datasets["train"], datasets["validation"] = hold_out(datasets["train"], spec, 0.1, seed)
        how = "stratified by label, " if spec.kind == CLASSIFICATION else ""
        notes.append(
            f"no validation file: {len(datasets['validation'])} of the training rows (10 %, {how}"
            f"by the hash of the text, seed {seed}) were held out as validation"
        )
        fingerprint["split"] = {"held_out": 0.1, "seed": seed, "validation": len(datasets["validation"])}
    train = datasets.pop("train", None)
    if train is None:
        train = datasets["validation"].select([])
        notes.append("no train split")
    elif spec.kind != SPAN:
        _overlap_note(spec, train, datasets["validation"], notes)
    if variant and len(train):
        train, note, fingerprint["variant"] = apply_variant(train, spec, variant)
        notes.append(note)
    train = sample(train, max_train_samples, seed, "max_train_samples") if len(train) else train
    evals = {split: sample(rows, max_eval_samples, seed, "max_eval_samples") for split, rows in datasets.items()}
    if max_train_samples is not None or max_eval_samples is not None:
        fingerprint["sample"] = {
            "seed": seed, "max_train_samples": max_train_samples, "max_eval_samples": max_eval_samples
        }  # fmt: skip
    fingerprint["rows"] = {"train": len(train), **{split: len(rows) for split, rows in evals.items()}}
    return TaskData(spec, train, evals.pop("validation"), evals, "; ".join(notes), fingerprint)


def _from_demo(
    name: str, data_dir: str | Path | None, notes: list[str], fingerprint: dict[str, object]
) -> dict[str, _Split]:
    if data_dir is not None:
        raise UserError(f"data_dir: task {name} has its data from a package; for files use --text-columns")
    splits, note, package = demo_columns(name)
    notes.append(note)
    fingerprint.update(package)
    return {split: _Split(columns, str(package["file"]), []) for split, columns in splits.items()}


def _from_files(
    data_dir: Path, spec: TaskSpec | None, texts: Sequence[str], label: str, notes: list[str]
) -> dict[str, _Split]:
    wanted = [*(spec.text_columns if spec else texts), spec.label_column if spec else label]
    if len(set(wanted)) != len(wanted):
        raise UserError(f"label_column: {label!r} is a text column too")
    splits: dict[str, _Split] = {}
    for split, paths in find_splits(data_dir, spec).items():
        parts = [_read_part(path, wanted, spec, notes) for path in paths]
        columns = {name: [value for part in parts for value in part.columns[name]] for name in parts[0].columns}
        where = parts[0].where if len(parts) == 1 else f"{paths[0].parent} ({split}, {len(paths)} shards)"
        splits[split] = _Split(columns, where, [file for part in parts for file in part.files])
    return splits


def _read_part(path: Path, wanted: Sequence[str], spec: TaskSpec | None, notes: list[str]) -> _Split:
    task = spec.name if spec else ""
    renames = _ORIGINAL_NAMES.get(task)
    columns, dropped = read_columns(
        path, wanted, renames, header=_COLA_HEADER if task == "cola" else None, drop_short=task == "qqp",
        optional=("id",) if spec is not None and spec.kind == SPAN else (),
    )  # fmt: skip
    if dropped:
        notes.append(f"{path.name}: {dropped} rows with too few fields were dropped")
    if path.suffix.lower() in UNTYPED:
        if spec is not None and spec.kind == SPAN:
            raise UserError(f"{path}: {path.suffix} cannot hold answers; use parquet, json or jsonl")
        columns[wanted[-1]] = typed(columns[wanted[-1]])
    rows = len(columns[wanted[0]])
    return _Split(columns, str(path), [{"file": path.name, "sha256": sha256_file(path), "rows": rows}])


def _from_hub(spec: TaskSpec | None, fingerprint: dict[str, object]) -> dict[str, _Split]:
    import datasets

    if spec is None or spec.hub is None:
        raise UserError("a custom task needs --data-dir: a file, or a folder with train and validation files")
    repo, config = spec.hub
    name = repo if config is None else f"{repo} ({config})"
    try:
        loaded: Mapping[str, Any] = datasets.load_dataset(repo, config)
    except Exception as error:  # any of a dozen network, cache and hub errors, from four libraries
        cause = (str(error) or type(error).__name__).strip().split("\n", 1)[0]
        raise UserError(
            f"could not load {name} from the Hugging Face hub ({type(error).__name__}: {cause}); "
            f"give --data-dir with a local copy, or use --task demo"
        ) from error
    fingerprint["hub"] = name
    found: dict[str, _Split] = {}
    for source, split in (
        ("train", "train"), ("validation", "validation"),
        ("validation_matched", "validation"), ("validation_mismatched", "mismatched"),
    ):  # fmt: skip
        if source in loaded:
            rows = loaded[source]
            wanted = [*spec.text_columns, spec.label_column, *(["id"] if spec.kind == SPAN else [])]
            columns = {column: rows[column][:] for column in wanted}
            feature = rows.features[spec.label_column]
            if isinstance(feature, ClassLabel):
                columns[spec.label_column] = class_words(columns[spec.label_column], feature.names)
            files: list[dict[str, object]] = [{"rows": len(rows), "fingerprint": str(rows._fingerprint)}]
            found[split] = _Split(columns, f"{name} {source}", files)
    return found


def _custom_spec(
    name: str, splits: Mapping[str, _Split], texts: Sequence[str], label: str, kind: str | None, notes: list[str]
) -> TaskSpec:
    """A custom task's spec from its labels; all splits together decide the kind, train alone the classes."""
    if kind not in (None, CLASSIFICATION, REGRESSION):
        raise UserError(f"kind: expected classification or regression, got {kind!r}")
    everything = [value for split in splits.values() for value in split.columns[label]]
    where = " and ".join(split.where for split in splits.values())
    names = infer_classes(everything, where, label)
    if kind == REGRESSION or (names is None and kind is None):
        return custom_task(name, REGRESSION, texts, label)
    if any(isinstance(value, float) for value in everything):
        notes.append(f"column {label!r} holds whole numbers only and was taken as classes")
    first = splits.get("train") or next(iter(splits.values()))
    names = infer_classes(first.columns[label], first.where, label, most_whole=None)
    if names is None:
        raise UserError(f"{where}: column {label!r} holds fractions, which cannot be classes")
    return custom_task(name, CLASSIFICATION, texts, label, names)


def _dataset(split: _Split, spec: TaskSpec) -> Dataset:
    label = spec.label_column
    texts = {name: Value("string") for name in spec.text_columns}
    columns: Columns = {name: split.columns[name] for name in spec.text_columns}
    values = split.columns[label]
    if spec.kind == SPAN:
        columns[label] = check_answers(values, columns[spec.text_columns[1]], spec, split.where)
        answers = {"text": [Value("string")], "answer_start": [Value("int64")]}
        columns["id"] = [str(value) for value in split.columns.get("id", range(split.rows))]
        return Dataset.from_dict(columns, features=Features({"id": Value("string"), **texts, label: answers}))
    if spec.kind == REGRESSION:
        columns[label] = numbers(values, split.where, label, spec.value_range)
        return Dataset.from_dict(columns, features=Features({**texts, label: Value("float64")}))
    columns[label] = class_numbers(values, spec.label_names, split.where, label, own_numbers=spec.name in TASKS)
    return Dataset.from_dict(columns, features=Features({**texts, label: ClassLabel(names=list(spec.label_names))}))


def _refuse_one_class(train: Dataset, spec: TaskSpec, where: str) -> None:
    found = set(train[spec.label_column][:])
    if len(found) < 2:
        names = ", ".join(spec.label_names[number] for number in found)
        raise UserError(
            f"{where}: column {spec.label_column!r} has one class only ({names}); two or more are needed to train"
        )


def _size_notes(spec: TaskSpec, datasets: Mapping[str, Dataset], notes: list[str]) -> None:
    official = dict(spec.official_rows)
    for split, rows in datasets.items():
        if split in official and len(rows) != official[split]:
            notes.append(f"{split} has {len(rows):,} rows, the official set {official[split]:,}: not comparable as is")


def _overlap_note(spec: TaskSpec, train: Dataset, validation: Dataset, notes: list[str]) -> None:
    seen = set(input_keys(train, spec))
    both = sum(key in seen for key in input_keys(validation, spec))
    if both:
        notes.append(f"{both:,} of {len(validation):,} validation inputs are in train too")
