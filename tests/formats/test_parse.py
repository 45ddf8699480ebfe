from __future__ import annotations

from typing import Any

import pytest

from sparsebert.errors import UserError
from sparsebert.formats import FORMATS, parse_format


@pytest.mark.parametrize(
    ("spelling", "name", "options"),
    [
        ("unstructured", "unstructured", {}),
        ("bitmap", "bitmap", {}),
        ("two_four", "two_four", {}),
        ("blocks:8x2", "blocks", {"block": (8, 2)}),
        ("semi_structured:2:4", "semi_structured", {"pattern": (2, 4)}),
        ("compact", "compact", {}),
        (" dense ", "dense", {}),
    ],
)
def test_spellings(spelling: str, name: str, options: dict[str, Any]) -> None:
    assert parse_format(spelling) == (FORMATS[name], options)


def test_names() -> None:
    assert list(FORMATS) == ["unstructured", "bitmap", "two_four", "blocks", "semi_structured", "compact", "dense"]
    assert all(cls.name == name for name, cls in FORMATS.items())


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("block:8x2", "unknown format 'block'; did you mean 'blocks'"),
        ("", "unknown format ''"),
        ("2:4", "unknown format '2:4'; did you mean 'semi_structured:2:4'"),
        ("dense:2", "format 'dense:2': dense takes no options; write 'dense'"),
        ("blocks", "format 'blocks': expected the size after the name, e.g. 'blocks:8x2'"),
        ("blocks:8", "e.g. 'blocks:8x2'"),
        ("blocks:0x2", "expected positive numbers"),
        ("semi_structured:4", "e.g. 'semi_structured:2:4'"),
        ("semi_structured:5:4", "n at most m"),
    ],
)
def test_other_words_are_refused(spelling: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_format(spelling)


def test_what_is_no_word_is_named() -> None:
    with pytest.raises(TypeError, match=r"format: expected the spelling of one, e\.g\. 'blocks:8x2', got None"):
        parse_format(None)  # type: ignore[arg-type]
