"""Errors that a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["UserError", "unknown"]


class UserError(ValueError):
    """Something the user gave cannot work; the message names it and says what to do.

    The commands print the message on one line and exit with status 2; library callers see a `ValueError`.
    """


def unknown(kind: str, word: object, known: Iterable[str]) -> UserError:
    """The error for a word that is none of the known ones: names the word, the nearest known one, and all of them."""
    choices = sorted(known)
    near = difflib.get_close_matches(str(word).lower(), choices, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {kind} {word!r}{hint} (known: {', '.join(choices)})")
