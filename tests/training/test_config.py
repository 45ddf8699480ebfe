"""Values of a configuration: cast to what is declared, or refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsebert.errors import UserError
from sparsebert.training.config import check_trainer, max_length, typed
from sparsebert.training.settings import RunSettings


@dataclass
class Example:
    whole: int = 1
    number: float = 1.0
    flag: bool = True
    word: str = ""
    perhaps: int | None = None
    share: float | None = None
    words: list[str] | None = None
    choice: Literal["hold", "stop"] = "hold"
    either: str | dict | None = None  # type: ignore[type-arg]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("whole", 3, 3),
        ("whole", 3.0, 3),
        ("whole", "3", 3),
        ("whole", 2**60 + 1, 2**60 + 1),
        ("number", "1e-5", 1e-5),
        ("number", 2, 2.0),
        ("flag", False, False),
        ("word", "film", "film"),
        ("perhaps", None, None),
        ("share", "0.5", 0.5),
        ("words", ["a", "b"], ["a", "b"]),
        ("choice", "stop", "stop"),
        ("either", {"a": 1}, {"a": 1}),
    ],
)
def test_what_fits_is_cast(name: str, value: Any, expected: Any) -> None:
    found = typed(Example, {name: value})[name]
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("whole", 2.5),
        ("whole", "many"),
        ("whole", True),
        ("whole", None),
        ("whole", [1]),
        ("number", "nan?"),
        ("number", False),
        ("flag", 1),
        ("flag", "yes"),
        ("word", 3),
        ("perhaps", "few"),
        ("words", "a"),
        ("words", [1]),
        ("choice", "go"),
    ],
)
def test_what_does_not_fit_is_named(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name):
        typed(Example, {name: value})


@given(st.floats(allow_nan=True), st.sampled_from(["learning_rate", "num_train_epochs", "weight_decay", "eval_steps"]))
def test_numbers_of_trainer(value: float, name: str) -> None:
    good = 0 <= value < float("inf") and (value > 0 or name in ("learning_rate", "weight_decay"))
    if good:
        check_trainer({name: value})
    else:
        with pytest.raises(UserError, match=name):
            check_trainer({name: value})


@given(st.integers(-5, 5))
def test_steps(value: int) -> None:
    if value == -1 or value >= 1:
        check_trainer({"max_steps": value})
    else:
        with pytest.raises(UserError, match="max_steps"):
            check_trainer({"max_steps": value})


def test_lengths() -> None:
    assert [max_length(RunSettings(task=task)) for task in ("demo", "squad", "sst2")] == [64, 384, 128]
    assert max_length(RunSettings(task="squad", max_length=7)) == 7
