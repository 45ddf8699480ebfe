"""Labels as files hold them (integers, names, numbers, text) to class numbers or floats, and to a model's numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparsebert.data.tasks import CLASSIFICATION, TaskSpec
from sparsebert.errors import UserError

__all__ = ["class_numbers", "infer_classes", "label_ids", "numbers", "rows_text", "typed"]

_MAX_WHOLE_CLASSES = 20
_ROWS_SHOWN = 5
_NAMES_SHOWN = 20
# No leading zeros: "007" is a word, and must not become the same class as "7".
_INTEGER = re.compile(r"\s*[+-]?(0|[1-9][0-9]*)\s*")
_FLOAT = re.compile(r"\s*[+-]?(((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?|nan|inf(inity)?)\s*", re.IGNORECASE)


def typed(values: Sequence[str]) -> list[Any]:
    """A column of an untyped file: integers if all are, else floats if all are, else the strings; blanks are None."""
    blanks = [None if not value.strip() else value for value in values]
    present = [value for value in blanks if value is not None]
    if all(_INTEGER.fullmatch(value) for value in present):
        return [None if value is None else int(value) for value in blanks]
    if all(_FLOAT.fullmatch(value) for value in present):
        return [None if value is None else float(value) for value in blanks]
    return list(blanks)


def rows_text(rows: Sequence[int]) -> str:
    """ "row 3" or "rows 3, 9, ..." with the first data row as 1."""
    shown = ", ".join(str(row + 1) for row in rows[:_ROWS_SHOWN])
    return f"row{'s' if len(rows) > 1 else ''} {shown}{', ...' if len(rows) > _ROWS_SHOWN else ''}"


def infer_classes(
    values: Sequence[Any], where: str, column: str, most_whole: int | None = _MAX_WHOLE_CLASSES
) -> tuple[str, ...] | None:
    """The class names of a custom label column, or None if the column is numbers to be predicted.

    Strings, integers and booleans are classes: names sorted, integers by size. Floats are numbers, unless all are
    whole with at most `most_whole` distinct values (None: however many): such a column is classes that went through
    a float (pandas does that to integers next to a missing value).

    Raises:
        UserError: values that are neither, or numbers mixed with text.
    """
    odd = next((value for value in values if not isinstance(value, (str, int, float, type(None)))), None)
    if odd is not None:
        raise UserError(f"{where}: column {column!r} holds {type(odd).__name__}, expected text or numbers as labels")
    distinct = {value for value in values if not _missing(value, minus_one=False)}
    fraction = next((value for value in distinct if isinstance(value, float)), None)
    if fraction is not None:
        text = next((value for value in distinct if isinstance(value, str)), None)
        if text is not None:
            raise UserError(f"{where}: column {column!r} mixes numbers and text ({fraction!r} and {text!r})")
        if not all(math.isfinite(value) and float(value).is_integer() for value in distinct):
            return None
        if most_whole is not None and len(distinct) > most_whole:
            return None
    names = {_name(value) for value in distinct}
    if all(_INTEGER.fullmatch(name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def class_numbers(
    values: Sequence[Any], names: Sequence[str], where: str, column: str, own_numbers: bool = True
) -> list[int]:
    """Class numbers of a label column.

    With `own_numbers` (the known tasks, whose order is fixed) the column may hold class numbers or class names, in
    any case of letters; without, names exactly.

    Raises:
        UserError: rows without a label (missing or -1: how many, and which first), or a label that is no class.
    """
    _refuse_missing(values, where, column, minus_one=True)
    table: dict[str, int] = {}
    if own_numbers:
        table.update({str(number): number for number in range(len(names))})
        table.update({name.casefold(): number for number, name in enumerate(names)})
    table.update({name: number for number, name in enumerate(names)})
    found: list[int] = []
    for row, value in enumerate(values):
        name = _name(value)
        number = table.get(name)
        if number is None and own_numbers:
            number = table.get(name.casefold())
        if number is None:
            known = ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
            origin = "the classes are" if own_numbers else "the classes of the training rows are"
            raise UserError(f"{where}: row {row + 1} has label {value!r} in column {column!r}; {origin} {known}")
        found.append(number)
    return found


def numbers(
    values: Sequence[Any], where: str, column: str, value_range: tuple[float, float] | None = None
) -> list[float]:
    """A regression column as floats.

    Raises:
        UserError: rows that are missing, not a number, not finite, or outside `value_range`, named.
    """
    negative_range = value_range is None or value_range[0] <= -1
    _refuse_missing(values, where, column, minus_one=not negative_range)
    try:
        found = [float(value) for value in values]
    except (TypeError, ValueError):
        bad = [row for row, value in enumerate(values) if not _is_number(value)]
        first = values[bad[0]]
        raise UserError(f"{where}: column {column!r} is not a number in {rows_text(bad)} ({first!r:.60})") from None
    _refuse(found, where, column, lambda value: not math.isfinite(value), "is not finite")
    if value_range is not None:
        low, high = value_range
        _refuse(found, where, column, lambda value: not low <= value <= high, f"is outside {low:g} to {high:g}")
    return found


def label_ids(spec: TaskSpec, model_label2id: Mapping[str, int] | None) -> dict[str, int]:
    """Label name to the model's output number.

    Labels are matched by name to the model's own map, disregarding case and punctuation; the meaning of names is
    not guessed. A model without a map, or with the placeholders LABEL_0, LABEL_1, ..., gets the task's order.

    Returns:
        One entry per label of the task; empty for regression and span.

    Raises:
        UserError: the model does not know one of the labels, or two labels would share an output (names both sides).
    """
    if spec.kind != CLASSIFICATION:
        return {}
    known = {str(name): int(number) for name, number in (model_label2id or {}).items()}
    if not known or all(re.fullmatch(r"LABEL_\d+", name) for name in known):
        return {name: number for number, name in enumerate(spec.label_names)}
    found = {name: known[name] for name in spec.label_names if name in known}
    rest = [name for name in known if name not in found]
    for name in spec.label_names:
        if name in found:
            continue
        near = [other for other in rest if _normal(other) and _normal(other) == _normal(name)]
        if len(near) == 1:
            found[name] = known[near[0]]
    missing = [name for name in spec.label_names if name not in found]
    sides = f"the data of task {spec.name} have {', '.join(spec.label_names)}; the model has {', '.join(known)}"
    if missing:
        raise UserError(
            f"the model does not know the label{'s' if len(missing) > 1 else ''} {', '.join(missing)}: {sides}; "
            "rename the labels on one side"
        )
    if len(set(found.values())) != len(found):
        raise UserError(f"two labels would share one output of the model: {sides}; rename the labels on one side")
    return {name: found[name] for name in spec.label_names}


def _normal(name: str) -> str:
    # A number keeps its sign and point: "-1" must not match "1".
    return name.strip() if _is_number(name) else re.sub(r"[\W_]+", "", name.casefold())


def _name(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _missing(value: Any, minus_one: bool) -> bool:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    if isinstance(value, str):
        return not value.strip() or (minus_one and value.strip() == "-1")
    return minus_one and not isinstance(value, bool) and value == -1


def _refuse_missing(values: Sequence[Any], where: str, column: str, minus_one: bool) -> None:
    bad = [row for row, value in enumerate(values) if _missing(value, minus_one)]
    if bad:
        what = "missing, NaN or -1" if minus_one else "missing or NaN"
        advice = "; if -1 is a class of its own, write the classes as words" if minus_one else ""
        raise UserError(
            f"{where}: {len(bad)} of {len(values)} rows have no label in column {column!r} ({what}): {rows_text(bad)}; "
            f"remove these rows, or use a split with labels{advice}"
        )


def _refuse(values: Sequence[float], where: str, column: str, wrong: Callable[[float], bool], what: str) -> None:
    bad = [row for row, value in enumerate(values) if wrong(value)]
    if bad:
        raise UserError(f"{where}: column {column!r} {what} in {rows_text(bad)} ({values[bad[0]]!r})")
