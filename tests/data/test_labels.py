from __future__ import annotations

import math

import pytest

from sparsebert.data import TASKS, label_ids
from sparsebert.data.labels import class_numbers, infer_classes, numbers, typed
from sparsebert.data.tasks import custom_task
from sparsebert.errors import UserError


def custom(*names: str):
    return custom_task("custom", "classification", ("text",), "label", names)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["1", "0", " 2 "], [1, 0, 2]),
        (["-1", "+3"], [-1, 3]),
        (["1", "0.5"], [1.0, 0.5]),
        (["1e3", ".5"], [1000.0, 0.5]),
        (["1", ""], [1, None]),
        (["pos", "neg", " "], ["pos", "neg", None]),
        (["1", "two"], ["1", "two"]),
        (["01", "1"], ["01", "1"]),
        (["1_0", "2_0"], ["1_0", "2_0"]),
    ],
)
def test_types_of_untyped_columns(values, expected) -> None:
    result = typed(values)
    assert result == expected
    assert [type(value) for value in result] == [type(value) for value in expected]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["b", "a", "b"], ("a", "b")),
        ([10, 2, 1], ("1", "2", "10")),
        (["10", "9"], ("9", "10")),
        ([True, False], ("False", "True")),
        ([1.0, 0.0, 3.0], ("0", "1", "3")),
        ([1.0, 0.0, math.nan, None], ("0", "1")),
        ([0.5, 1.0], None),
        ([1.0, math.inf], None),
        ([float(n) for n in range(20)], tuple(str(n) for n in range(20))),
        ([float(n) for n in range(21)], None),
        (list(range(100)), tuple(str(n) for n in range(100))),
    ],
)
def test_what_a_label_column_is(values, names) -> None:
    assert infer_classes(values, "f", "label") == names


@pytest.mark.parametrize(
    ("values", "message"),
    [([[1], [2]], "holds list"), ([{"a": 1}], "holds dict"), ([0.5, "a"], "mixes numbers and text")],
)
def test_label_columns_that_make_no_sense(values, message) -> None:
    with pytest.raises(UserError, match=message):
        infer_classes(values, "f", "label")


@pytest.mark.parametrize("values", [[0, 1, 2], ["0", "1", "2"], ["a", "b", "c"], ["A", " b", "C"], [0.0, "b", 2]])
def test_numbers_and_names_of_classes(values) -> None:
    assert class_numbers(values, ("a", "b", "c"), "f", "label") == [0, 1, 2]


def test_custom_classes_go_by_their_own_names_only() -> None:
    assert class_numbers([1, 2], ("1", "2"), "f", "label", own_numbers=False) == [0, 1]
    with pytest.raises(UserError, match=r"row 2 has label 0 .* classes of the training rows are 1, 2"):
        class_numbers([1, 0], ("1", "2"), "f", "label", own_numbers=False)
    with pytest.raises(UserError, match="has label 'A'"):
        class_numbers(["A"], ("a", "b"), "f", "label", own_numbers=False)


@pytest.mark.parametrize("value", [2, "2", "no", 0.5, True])
def test_labels_that_are_no_class(value) -> None:
    with pytest.raises(UserError, match=r"f: row 2 has label .* in column 'label'; the classes are a, b"):
        class_numbers([0, value], ("a", "b"), "f", "label")


@pytest.mark.parametrize("value", [-1, "-1", -1.0, None, math.nan, "", " "])
def test_rows_without_a_label_are_counted(value) -> None:
    with pytest.raises(UserError, match=r"f: 2 of 4 rows have no label in column 'label' .*: rows 2, 4"):
        class_numbers([0, value, 1, value], ("a", "b"), "f", "label")


def test_regression_values() -> None:
    assert numbers([1, "2.5", 0.0], "f", "label") == [1.0, 2.5, 0.0]
    assert numbers([-1.0, 1], "f", "label") == [-1.0, 1.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, math.nan, None], r"2 of 3 rows have no label .*rows 2, 3"),
        ([1.0, math.inf], r"is not finite in row 2"),
        ([1.0, "a"], r"is not a number in row 2 .'a'."),
        ([1.0, [2]], r"is not a number in row 2"),
        ([1.0, 5.5, 6.0], r"is outside 0 to 5 in rows 2, 3 .5.5."),
        ([1.0, -1.0], r"1 of 2 rows have no label"),
    ],
)
def test_wrong_regression_values(values, message) -> None:
    with pytest.raises(UserError, match=message):
        numbers(values, "f", "label", (0.0, 5.0))


@pytest.mark.parametrize("model", [None, {}, {"LABEL_0": 0, "LABEL_1": 1}, {"LABEL_0": 0}])
def test_a_model_without_a_map_gets_the_tasks_order(model) -> None:
    assert label_ids(TASKS["wnli"], model) == {"not_entailment": 0, "entailment": 1}


def test_a_models_map_goes_by_name() -> None:
    model = {"CONTRADICTION": 0, "Neutral": 1, "entailment": 2}
    assert label_ids(TASKS["mnli"], model) == {"entailment": 2, "neutral": 1, "contradiction": 0}
    assert list(label_ids(TASKS["mnli"], model)) == ["entailment", "neutral", "contradiction"]
    assert label_ids(TASKS["rte"], {"not entailment": 0, "Entailment": 1, "other": 2}) == {
        "entailment": 1, "not_entailment": 0
    }  # fmt: skip


def test_signs_and_marks_are_told_apart() -> None:
    assert label_ids(custom("-1", "1"), {"1": 0, "-1": 1}) == {"-1": 1, "1": 0}
    assert label_ids(custom("+", "-"), {"-": 0, "+": 1}) == {"+": 1, "-": 0}
    assert label_ids(custom("a.b", "ab"), {"ab": 0, "a.b": 1}) == {"a.b": 1, "ab": 0}
    with pytest.raises(UserError, match="does not know the label -1"):
        label_ids(custom("-1", "1"), {"1": 0, "0": 1})


@pytest.mark.parametrize("model", [{"NEG": 0, "POS": 1}, {"0": 0, "1": 1}, {"negative": 0, "neutral": 1}])
def test_an_unknown_label_names_both_sides(model) -> None:
    with pytest.raises(
        UserError, match=rf"data of task sst2 have negative, positive; the model has {', '.join(model)}"
    ):
        label_ids(TASKS["sst2"], model)


def test_two_labels_cannot_share_an_output() -> None:
    with pytest.raises(UserError, match="share one output"):
        label_ids(TASKS["sst2"], {"negative": 0, "positive": 0})
    with pytest.raises(UserError, match="does not know the label Ab"):
        label_ids(custom("Ab", "ab"), {"ab": 0, "cd": 1})


def test_ambiguous_names_are_not_guessed() -> None:
    with pytest.raises(UserError, match="does not know the label not_entailment"):
        label_ids(TASKS["rte"], {"entailment": 0, "not-entailment": 1, "not entailment": 2})


@pytest.mark.parametrize("task", ["stsb", "squad"])
def test_no_labels_no_map(task) -> None:
    assert label_ids(TASKS[task], {"x": 0}) == {}
