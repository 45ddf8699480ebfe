from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from sparsebert.data import TASKS, compute_metrics
from sparsebert.data.tasks import custom_task
from sparsebert.errors import UserError

NUMBERS = custom_task("custom", "regression", ("text",), "label")
CLASSES = custom_task("custom", "classification", ("text",), "label", ("a", "b", "c"))


def one_hot(predicted, classes=2) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[np.array(predicted)]


def test_worked_by_hand() -> None:
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives
    labels = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    predicted = one_hot([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    assert compute_metrics(TASKS["sst2"], predicted, labels) == {"accuracy": pytest.approx(0.7)}
    assert compute_metrics(TASKS["mrpc"], predicted, labels) == {
        "accuracy": pytest.approx(0.7), "f1": pytest.approx(2 / 3), "combined": pytest.approx((0.7 + 2 / 3) / 2)
    }  # fmt: skip
    matthews = (3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6)
    assert compute_metrics(TASKS["cola"], predicted, labels) == {
        "matthews_correlation": pytest.approx(matthews), "accuracy": pytest.approx(0.7)
    }  # fmt: skip


def test_correlations_worked_by_hand() -> None:
    scores = compute_metrics(TASKS["stsb"], np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 3.0, 2.0]))
    assert scores["spearman"] == pytest.approx(0.5)
    assert scores["pearson"] == pytest.approx(1 / math.sqrt(2 * 14 / 3))
    assert scores["combined"] == pytest.approx((scores["spearman"] + scores["pearson"]) / 2)
    assert compute_metrics(NUMBERS, np.array([1.0, 2.0]), np.array([2.0, 4.0]))["mse"] == pytest.approx(2.5)


def test_f1_follows_the_models_own_order() -> None:
    labels, predicted = np.array([0, 0, 1, 1]), one_hot([0, 1, 1, 1])
    reversed_ids = {"not_equivalent": 1, "equivalent": 0}
    assert compute_metrics(TASKS["mrpc"], predicted, labels)["f1"] == pytest.approx(0.8)
    assert compute_metrics(TASKS["mrpc"], predicted, labels, reversed_ids)["f1"] == pytest.approx(2 / 3)


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_classification_equals_scikit_learn(count, seed) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(count, 3)).astype(np.float32), rng.integers(0, 3, count)
    predicted = logits.argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        custom = compute_metrics(CLASSES, logits, labels)
        two = {name: compute_metrics(TASKS[name], logits[:, :2], labels % 2) for name in ("cola", "qqp")}
    assert custom["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted))
    assert custom["macro_f1"] == pytest.approx(sk.f1_score(labels, predicted, average="macro", zero_division=0))
    labels, predicted = labels % 2, logits[:, :2].argmax(1)
    assert two["qqp"]["f1"] == pytest.approx(sk.f1_score(labels, predicted, zero_division=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert two["cola"]["matthews_correlation"] == pytest.approx(sk.matthews_corrcoef(labels, predicted))


@settings(deadline=None, max_examples=80)
@given(st.integers(2, 40), st.integers(0, 2**32 - 1), st.booleans())
def test_regression_equals_scipy(count, seed, ties) -> None:
    rng = np.random.default_rng(seed)
    predicted, labels = rng.normal(size=count), rng.normal(size=count)
    if ties:
        predicted, labels = np.round(predicted), np.round(labels)
    scores = compute_metrics(NUMBERS, predicted.reshape(-1, 1), labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [stats.spearmanr(predicted, labels)[0], stats.pearsonr(predicted, labels)[0]]
    assert scores["spearman"] == pytest.approx(np.nan_to_num(expected[0]), abs=1e-12)
    assert scores["pearson"] == pytest.approx(np.nan_to_num(expected[1]), abs=1e-12)
    assert all(math.isfinite(value) for value in scores.values())


@pytest.mark.parametrize("side", ["labels", "predictions", "both", "one row"])
def test_constant_sides_give_zero_correlation(side) -> None:
    varied = np.array([1.0, 2.0, 3.0, 4.0])
    constant = np.full(4, 2.0)
    predicted = constant if side in ("predictions", "both") else varied
    labels = constant if side in ("labels", "both") else varied
    if side == "one row":
        predicted, labels = varied[:1], varied[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = compute_metrics(TASKS["stsb"], predicted, labels)
        assert (scores["spearman"], scores["pearson"], scores["combined"]) == (0.0, 0.0, 0.0)
        classes = compute_metrics(TASKS["cola"], one_hot(predicted.astype(int) % 2), labels.astype(int) % 2)
    if side != "one row":
        assert classes["matthews_correlation"] == 0.0


def test_all_one_class_predicted() -> None:
    scores = compute_metrics(TASKS["mrpc"], one_hot([0, 0, 0]), np.array([1, 1, 0]))
    assert (scores["accuracy"], scores["f1"]) == (pytest.approx(1 / 3), 0.0)


@pytest.mark.parametrize("name", [name for name, spec in TASKS.items() if spec.kind != "span"])
def test_every_promised_metric_is_there(name) -> None:
    spec = TASKS[name]
    width = max(1, len(spec.label_names))
    labels = np.arange(6) % width if spec.label_names else np.linspace(0, 5, 6)
    logits = one_hot(labels, width) if spec.label_names else labels.reshape(-1, 1)
    scores = compute_metrics(spec, logits, labels)
    assert tuple(scores) == spec.metrics
    assert all(type(value) is float for value in scores.values())
    assert scores[spec.metric] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("task", "logits", "labels", "message"),
    [
        ("sst2", np.zeros((3, 2)), np.zeros(4, int), r"expected shape \(4, classes\) for task sst2, got \(3, 2\)"),
        ("sst2", np.zeros(3), np.zeros(3, int), r"got \(3,\)"),
        ("stsb", np.zeros((3, 2)), np.zeros(3), r"expected shape \(3, 1\)"),
        ("sst2", np.zeros((0, 2)), np.zeros(0, int), r"at least one"),
        ("sst2", np.zeros((2, 2)), np.array([0, 2]), r"expected 0 to 1 for 2 outputs, got 0 to 2"),
        ("sst2", np.zeros((2, 2)), np.array([0, -100]), r"got -100 to 0"),
        ("sst2", np.array([[0, np.nan], [0, 1]]), np.array([0, 1]), r"1 of 2 rows are not finite"),
        ("stsb", np.array([np.inf, 1.0]), np.array([0.0, 1.0]), r"1 of 2 rows are not finite"),
        ("squad", np.zeros((2, 2)), np.array([0, 1]), r"scored by span_metrics"),
    ],
)
def test_wrong_arrays(task, logits, labels, message) -> None:
    with pytest.raises(UserError, match=message):
        compute_metrics(TASKS[task], logits, labels)
