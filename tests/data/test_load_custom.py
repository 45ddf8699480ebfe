from __future__ import annotations

import dataclasses
import math

import pytest

from sparsebert.data import TASKS, load_task
from sparsebert.errors import UserError


@pytest.mark.parametrize("ending", ["parquet", "csv", "tsv", "jsonl", "json"])
def test_one_custom_file(tmp_path, write, ending) -> None:
    columns = {
        "review": [f"review {n}" for n in range(60)],
        "mood": [("good", "bad", "fair")[n % 3] for n in range(60)],
    }
    path = write(tmp_path / f"reviews.{ending}", columns)
    data = load_task("custom", path, ["review"], "mood")
    assert data.spec.label_names == ("bad", "fair", "good")
    assert (data.spec.kind, data.spec.metric, data.spec.text_columns) == ("classification", "accuracy", ("review",))
    assert sorted(data.validation["mood"][:]) == [0, 0, 1, 1, 2, 2]
    assert len(data.train) == 54
    assert "no validation file" in data.note
    names = {row["review"]: data.spec.label_names[row["mood"]] for row in data.train}
    assert all(names[review] == mood for review, mood in zip(*columns.values(), strict=True) if review in names)


def test_a_custom_folder(tmp_path, write) -> None:
    for split in ("train", "val"):
        write(tmp_path / f"{split}.csv", {"a": ["x", "y"], "b": ["u", "v"], "label": [10, 9]})
    data = load_task("custom", tmp_path, ["a", "b"])
    assert data.spec.label_names == ("9", "10")
    assert data.train["label"][:] == [1, 0]
    assert data.spec.is_pair


def test_kinds_of_custom_labels(tmp_path, write) -> None:
    def spec(labels, ending="jsonl", **settings):
        texts = [f"text {n}" for n in range(len(labels))]
        path = write(tmp_path / f"a.{ending}", {"text": texts, "label": labels})
        return load_task("custom", path, ["text"], "label", **settings)

    fractions = [n / 4 for n in range(40)]
    for ending in ("jsonl", "csv", "parquet"):
        data = spec(fractions, ending)
        assert (data.spec.kind, data.spec.metric, data.spec.label_names) == ("regression", "spearman", ())
        assert set(data.train["label"][:]) | set(data.validation["label"][:]) == set(fractions)
        whole = spec([float(n % 2) for n in range(40)], ending)
        assert whole.spec.label_names == ("0", "1")
        assert "whole numbers only and was taken as classes" in whole.note
    assert spec([n % 2 for n in range(40)], kind="regression").spec.kind == "regression"
    assert len(spec([float(n % 30) for n in range(90)], kind="classification").spec.label_names) == 30
    assert spec([float(n % 30) for n in range(90)]).spec.kind == "regression"
    assert spec([n % 2 == 0 for n in range(40)]).spec.label_names == ("False", "True")
    with pytest.raises(UserError, match="fractions, which cannot be classes"):
        spec(fractions, kind="classification")
    with pytest.raises(UserError, match="kind: expected classification or regression, got 'span'"):
        spec(fractions, kind="span")


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ([0, 1], [0, 2], r"validation.jsonl: row 2 has label 2 .* training rows are 0, 1"),
        (["a", "b"], ["c"], r"has label 'c' .* training rows are a, b"),
        (["a", "a"], ["a"], r"train.jsonl: column 'label' has one class only \(a\)"),
        ([0, -1, 1], [0], r"train.jsonl: 1 of 3 rows have no label .*row 2;.*write the classes as words"),
        ([0, 1], [-1, -1], r"validation.jsonl: 2 of 2 rows have no label"),
        ([0, None, 1], [0], r"1 of 3 rows have no label .*row 2"),
        (["a", "", "b"], ["a"], r"1 of 3 rows have no label .*row 2"),
        ([0.5, math.nan, 1.5], [0.5], r"1 of 3 rows have no label .*row 2"),
        ([0.5, 1.5], [math.inf], r"validation.jsonl: column 'label' is not finite in row 1"),
        ([0.5, 1.5], ["a"], r"mixes numbers and text"),
        ([[1], [2]], [[1]], r"holds list"),
    ],
)
def test_wrong_custom_labels(tmp_path, write, train, validation, message) -> None:
    for split, labels in (("train", train), ("validation", validation)):
        columns = {"text": [f"{split} {n}" for n in range(len(labels))], "label": labels}
        write(tmp_path / f"{split}.jsonl", columns)
    with pytest.raises(UserError, match=message):
        load_task("custom", tmp_path, ["text"])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([" ", "\t"], r"column 'text' is blank in all 2 rows"),
        (["a", None], r"1 of 2 rows have no text in column 'text': row 2"),
        (["a", 3], r"column 'text' holds int in row 2, expected text"),
        (["a", "\ud800"], r"not valid Unicode"),
        ([], r"empty|no rows"),
    ],
)
def test_wrong_texts(tmp_path, write, texts, message) -> None:
    path = write(tmp_path / "a.jsonl", {"text": texts, "label": list(range(len(texts)))})
    with pytest.raises(UserError, match=rf"a.jsonl: .*{message}"):
        load_task("custom", path, ["text"])


def test_a_header_without_rows(tmp_path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n")
    with pytest.raises(UserError, match=r"a.csv: the file has no rows"):
        load_task("custom", path, ["text"])


def test_a_blank_text_in_some_rows_is_fine(tmp_path, write) -> None:
    path = write(tmp_path / "a.csv", {"text": [f"text {n}" if n else "" for n in range(20)], "label": [0, 1] * 10})
    assert len(load_task("custom", path, ["text"]).train) == 18


def test_wrong_columns_and_arguments(tmp_path, write) -> None:
    path = write(tmp_path / "a.csv", {"text": ["a", "b"], "label": [0, 1]})
    with pytest.raises(UserError, match=r"a.csv: no column 'review'; the columns there are 'text', 'label'"):
        load_task("custom", path, ["review"])
    with pytest.raises(UserError, match=r"no column 'sentence'"):
        load_task("sst2", path)
    with pytest.raises(UserError, match=r"label_column: 'text' is a text column too"):
        load_task("custom", path, ["text"], "text")
    with pytest.raises(UserError, match=r"kind: task sst2 is classification, got 'regression'"):
        load_task("sst2", path, ["text"], kind="regression")
    with pytest.raises(UserError, match=r"needs --data-dir"):
        load_task("custom", None, ["text"])
    with pytest.raises(UserError, match=r"does not exist"):
        load_task("sst2", tmp_path / "absent")
    with pytest.raises(UserError, match=r"column 'label' has one class only \(negative\)"):
        load_task("sst2", write(tmp_path / "b.csv", {"text": ["a", "b"], "label": [0, 0]}), ["text"])


def test_a_known_task_with_other_column_names(tmp_path, write) -> None:
    path = write(
        tmp_path / "a.csv", {"review": [f"text {n}" for n in range(40)], "gold": ["positive", "negative"] * 20}
    )
    data = load_task("sst2", path, "review", "gold")
    assert data.spec == dataclasses.replace(TASKS["sst2"], text_columns=("review",), label_column="gold")
    assert set(data.train["gold"][:]) == {0, 1}
