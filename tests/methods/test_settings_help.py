"""`describe`: the docstring under a setting is its flag's help."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest

from sparsebert.methods import METHODS
from sparsebert.methods.base import describe


@dataclass(frozen=True)
class Plain:
    """A class of settings."""

    first: int = 1
    """The first one."""
    bare: int = 2
    second: float = 0.5
    """The second one,
    over two lines."""

    @property
    def double(self) -> int:
        """No setting."""
        return 2 * self.first


@dataclass(frozen=True)
class Derived(Plain):
    """Inherits and changes."""

    second: float = 0.7
    first: int = 3
    """Said anew."""
    third: str = "x"
    """Its own."""


@dataclass(frozen=True)
class Empty:
    """Nothing."""


def test_each_field_has_the_docstring_under_it() -> None:
    assert describe(Plain) == {"first": "The first one.", "bare": "", "second": "The second one, over two lines."}


def test_inherited_fields_keep_theirs_unless_said_anew() -> None:
    assert describe(Derived) == {
        "first": "Said anew.",
        "bare": "",
        "second": "The second one, over two lines.",
        "third": "Its own.",
    }


def test_no_fields_no_help() -> None:
    assert describe(Empty) == {}


def test_a_class_inside_a_function_is_read_too() -> None:
    @dataclass
    class Local:
        here: int = 0
        """Found."""

    assert describe(Local) == {"here": "Found."}


def test_a_class_without_source_has_no_help() -> None:
    made = dataclasses.make_dataclass("Made", [("field", int, 0)])
    assert describe(made) == {"field": ""}


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_every_method_is_explained(name: str) -> None:
    notes = describe(METHODS[name].Settings)
    assert list(notes) == [field.name for field in dataclasses.fields(METHODS[name].Settings)]
    assert [field for field, note in notes.items() if not note] == []


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert method.summary and "\n" not in method.summary
    assert dataclasses.is_dataclass(method.Settings)
    settings = method.Settings()
    for field in dataclasses.fields(settings):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(settings, field.name, None)
