from __future__ import annotations

import dataclasses
import json
import pickle

import pytest

from sparsebert.data import TASKS
from sparsebert.data.tasks import find_task
from sparsebert.errors import UserError

GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")


def test_the_promised_tasks_are_there() -> None:
    assert set(TASKS) == {*GLUE, "squad", "squad_v2", "demo", "demo_imdb"}
    assert all(TASKS[name].hub == ("nyu-mll/glue", name) for name in GLUE)


def test_label_orders_are_those_of_the_hub() -> None:
    assert TASKS["cola"].label_names == ("unacceptable", "acceptable")
    assert TASKS["sst2"].label_names == ("negative", "positive")
    assert TASKS["mrpc"].label_names == ("not_equivalent", "equivalent")
    assert TASKS["qqp"].label_names == ("not_duplicate", "duplicate")
    assert TASKS["mnli"].label_names == ("entailment", "neutral", "contradiction")
    assert TASKS["qnli"].label_names == TASKS["rte"].label_names == ("entailment", "not_entailment")
    assert TASKS["wnli"].label_names == ("not_entailment", "entailment")
    assert TASKS["stsb"].label_names == TASKS["squad"].label_names == ()


@pytest.mark.parametrize("spec", TASKS.values(), ids=lambda spec: spec.name)
def test_specs_are_consistent(spec) -> None:
    assert spec.metric in spec.metrics
    assert (len(spec.label_names) >= 2) == (spec.kind == "classification")
    assert spec.num_labels == (len(spec.label_names) or {"regression": 1, "span": 2}[spec.kind])
    assert spec.positive is None or spec.positive in spec.label_names
    assert spec.is_pair == (len(spec.text_columns) == 2)
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert json.loads(json.dumps(dataclasses.asdict(spec)))["name"] == spec.name


def test_primary_metrics() -> None:
    primary = {name: spec.metric for name, spec in TASKS.items()}
    assert primary["cola"] == "matthews_correlation"
    assert primary["stsb"] == "spearman"
    assert primary["mrpc"] == primary["squad"] == primary["squad_v2"] == "f1"
    assert {primary[name] for name in ("sst2", "qqp", "mnli", "qnli", "rte", "wnli", "demo")} == {"accuracy"}


def test_columns_of_a_known_task_can_be_renamed() -> None:
    spec = find_task("rte", ("a", "b"), "gold")
    assert spec is not None
    assert (spec.text_columns, spec.label_column, spec.label_names) == (("a", "b"), "gold", TASKS["rte"].label_names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sst3",), "unknown task 'sst3'; did you mean 'sst2'"),
        (("custom",), "--text-columns"),
        (("mine", ("a", "b", "c")), "one or two column names, got 3"),
        (("mine", ()), "one or two column names, got 0"),
        (("mine", ("a", "a")), "'a' is named twice"),
        (("sst2", ("a", "b")), "task sst2 takes 1 .sentence., got 2 .a, b."),
        (("squad", ("a", "b")), "task squad has fixed columns"),
        (("squad", None, "a"), "task squad has fixed columns"),
        (("demo", ("a",)), "task demo has fixed columns"),
    ],
)
def test_wrong_names_are_refused(arguments, message) -> None:
    with pytest.raises(UserError, match=message):
        find_task(*arguments)
