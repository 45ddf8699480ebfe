"""Formats by name, and as a user spells them."""

from __future__ import annotations

import re
from typing import Any

from sparsebert.errors import UserError, unknown
from sparsebert.formats.base import Format
from sparsebert.formats.bitmap import Bitmap
from sparsebert.formats.blocks import Blocks
from sparsebert.formats.compact import Compact
from sparsebert.formats.dense import Dense
from sparsebert.formats.semi_structured import SemiStructured
from sparsebert.formats.two_four import TwoFour
from sparsebert.formats.unstructured import Unstructured

__all__ = ["FORMATS", "parse_format"]

FORMATS: dict[str, type[Format]] = {
    cls.name: cls for cls in (Unstructured, Bitmap, TwoFour, Blocks, SemiStructured, Compact, Dense)
}

# Spelling of a format's options: what follows its name, and an example.
_OPTIONS = {
    "blocks": ("block", re.compile(r"(\d+)x(\d+)"), "blocks:8x2"),
    "semi_structured": ("pattern", re.compile(r"(\d+):(\d+)"), "semi_structured:2:4"),
}


def parse_format(spelling: str) -> tuple[type[Format], dict[str, Any]]:
    """The class of a format and the options of its `from_dense`.

    Args:
        spelling: "unstructured", "bitmap", "two_four", "blocks:RxC", "semi_structured:n:m", "compact" or "dense".

    Raises:
        TypeError: no string. UserError: a spelling that is none of these.
    """
    if not isinstance(spelling, str):
        raise TypeError(f"format: expected the spelling of one, e.g. 'blocks:8x2', got {spelling!r}")
    name, _, rest = spelling.strip().partition(":")
    if name.isdecimal():
        raise UserError(f"unknown format {spelling!r}; did you mean 'semi_structured:{spelling.strip()}'?")
    if name not in FORMATS:
        raise unknown("format", name, FORMATS)
    if name not in _OPTIONS:
        if rest:
            raise UserError(f"format {spelling!r}: {name} takes no options; write {name!r}")
        return FORMATS[name], {}
    option, pattern, example = _OPTIONS[name]
    found = pattern.fullmatch(rest)
    if found is None:
        raise UserError(f"format {spelling!r}: expected the size after the name, e.g. {example!r}")
    first, second = int(found[1]), int(found[2])
    if first < 1 or second < 1 or (option == "pattern" and first > second):
        raise UserError(f"format {spelling!r}: expected positive numbers, n at most m; e.g. {example!r}")
    return FORMATS[name], {option: (first, second)}
