"""Reading one file into columns: parquet, csv, tsv, json, jsonl, each with errors that name the file and the cause.

csv follows RFC 4180 (quotes, doubled quotes inside). tsv has no quoting at all, as in GLUE's own files: a quote is
an ordinary character, and a text cannot hold a tab or a line break.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsebert.data.labels import rows_text
from sparsebert.errors import UserError

__all__ = ["ENDINGS", "UNTYPED", "Columns", "check_texts", "class_words", "read_columns", "read_text"]

Columns = dict[str, list[Any]]
ENDINGS = (".parquet", ".csv", ".tsv", ".jsonl", ".json")
UNTYPED = (".csv", ".tsv")
"""Endings whose values are all strings."""

_NAMES_SHOWN = 20


def read_columns(
    path: Path,
    wanted: Sequence[str],
    renames: Mapping[str, str] | None = None,
    header: Sequence[str] | None = None,
    drop_short: bool = False,
    optional: Sequence[str] = (),
) -> tuple[Columns, int]:
    """The wanted columns of a file, all of one length.

    Args:
        path: a file with one of `ENDINGS`.
        wanted: column names.
        renames: wanted name to the name it may have in the file instead.
        header: column names of a tsv file whose first line is data; used only if that line fits them.
        drop_short: drop tsv rows with too few fields (some of GLUE's own files have a few) instead of refusing.
        optional: further columns, taken where the file has them.

    Returns:
        The columns and how many rows were dropped.

    Raises:
        UserError: the file is missing, empty, not what its ending says, broken at a line, or lacks a column.
    """
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"{path}: expected a file ending in {', '.join(ENDINGS)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix.lower() == ".parquet":
        return _parquet(path, wanted, renames or {}, optional), 0
    text, dropped = read_text(path), 0
    match path.suffix.lower():
        case ".csv":
            columns = _csv(path, text)
        case ".tsv":
            columns, dropped = _tsv(path, text, header, drop_short)
        case ".jsonl":
            columns = _from_objects(path, _json_lines(path, text))
        case _:
            columns = _json(path, text)
    names = _resolve(path, wanted, renames or {}, list(columns), optional)
    return {column: columns[name] for column, name in names.items()}, dropped


def class_words(values: list[Any], names: Sequence[str]) -> list[str | None]:
    """Integers of a column whose file declares class names, as those names; None for -1, None and out of range."""
    return [names[v] if isinstance(v, int) and 0 <= v < len(names) else None for v in values]


def _resolve(
    path: Path, wanted: Sequence[str], renames: Mapping[str, str], found: Sequence[str], optional: Sequence[str]
) -> dict[str, str]:
    """Column asked for to its name in the file."""
    names = {column: column if column in found else renames.get(column, column) for column in wanted}
    missing = [column for column, name in names.items() if name not in found]
    if missing:
        shown = ", ".join(repr(name) for name in found[:_NAMES_SHOWN])
        more = f" and {len(found) - _NAMES_SHOWN} more" if len(found) > _NAMES_SHOWN else ""
        plural = "s" if len(missing) > 1 else ""
        raise UserError(
            f"{path}: no column{plural} {', '.join(map(repr, missing))}; the columns there are {shown or 'none'}{more}"
        )
    return {**names, **{column: column for column in optional if column in found}}


def _parquet(path: Path, wanted: Sequence[str], renames: Mapping[str, str], optional: Sequence[str]) -> Columns:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import ClassLabel, Features

    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        names = _resolve(path, wanted, renames, schema.names, optional)
        table = file.read(columns=list(dict.fromkeys(names.values())))
        columns = {column: table[name].to_pylist() for column, name in names.items()}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable parquet file: {_first_line(error)}{_looks(path)}") from error
    try:
        features = Features.from_arrow_schema(schema)
    except Exception:  # the metadata is an extra that other writers may shape as they like
        return columns
    for column, name in names.items():
        feature = features.get(name)
        if isinstance(feature, ClassLabel) and feature.names:
            columns[column] = class_words(columns[column], feature.names)
    return columns


def check_texts(values: Sequence[Any], where: str, name: str) -> None:
    """A `UserError` unless a column holds text in every row, valid Unicode, and is not blank throughout.

    Args:
        values: of the column.
        where: the file, for the message.
        name: of the column.
    """
    if not values:
        raise UserError(f"{where}: the file has no rows")
    missing = [row for row, value in enumerate(values) if value is None]
    if missing:
        raise UserError(
            f"{where}: {len(missing)} of {len(values)} rows have no text in column {name!r}: {rows_text(missing)}"
        )
    odd = next((row for row, value in enumerate(values) if not isinstance(value, str)), None)
    if odd is not None:
        kind = type(values[odd]).__name__
        raise UserError(f"{where}: column {name!r} holds {kind} in row {odd + 1}, expected text")
    if not any(value.strip() for value in values):
        raise UserError(f"{where}: column {name!r} is blank in all {len(values)} rows")
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: column {name!r} has text that is not valid Unicode") from None


def read_text(path: Path) -> str:
    """A file's text, without a byte order mark.

    Raises:
        UserError: the file cannot be read, is empty, not UTF-8, compressed, parquet or a Git LFS pointer.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if data[:4] == b"PAR1":
        raise UserError(f"{path}: the file is parquet; rename it to end in .parquet")
    if data[:2] == b"\x1f\x8b" or data[:4] == b"PK\x03\x04":
        raise UserError(f"{path}: the file is compressed; unpack it first")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}, line {line}); save it as UTF-8") from error
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    if text.startswith(_LFS):
        raise UserError(f"{path}: {_LFS_ADVICE}")
    return text


def _csv(path: Path, text: str) -> Columns:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    # The module's limit of 128 KB a field is lifted for this read: a document may be longer, and a quote that is
    # never closed then gives the clearer "unexpected end of data".
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    rows: list[list[str]] = []
    opened = 1
    try:
        for row in reader:
            if row:
                width = len(rows[0]) if rows else len(row)
                _check_width(path, opened, len(row), width, "a text with commas needs quotes")
                rows.append(row)
            opened = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}: broken csv in the row that begins at line {opened}: {error}") from error
    finally:
        csv.field_size_limit(limit)
    return _from_rows(path, rows[0], rows[1:])


def _tsv(path: Path, text: str, header: Sequence[str] | None, drop_short: bool) -> tuple[Columns, int]:
    # Split at line feeds alone: str.splitlines would also break at U+2028 and the like inside a text.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if not lines[-1]:
        lines.pop()
    names = lines[0].split("\t")
    start = 1
    if header is not None and len(names) == len(header) and not set(names) & set(header):
        names, start = list(header), 0
    rows: list[list[str]] = []
    dropped = 0
    for number, line in enumerate(lines[start:], start + 1):
        row = line.split("\t")
        if len(row) < len(names) and (drop_short or (not line and len(names) > 1)):
            dropped += bool(line)
            continue
        _check_width(path, number, len(row), len(names), "tsv has no quoting; texts with tabs or line breaks need csv")
        rows.append(row)
    return _from_rows(path, names, rows), dropped


def _check_width(path: Path, line: int, got: int, expected: int, advice: str) -> None:
    if got != expected:
        raise UserError(f"{path}: line {line} has {got} fields, the header has {expected} ({advice})")


def _from_rows(path: Path, names: Sequence[str], rows: Sequence[Sequence[str]]) -> Columns:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise UserError(f"{path}: the header names {', '.join(map(repr, twice))} more than once")
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}


def _json_lines(path: Path, text: str) -> list[Any]:
    objects = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            objects.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is not JSON: {_first_line(error)}") from error
        if not isinstance(objects[-1], dict):
            raise UserError(f"{path}: line {number} is a {type(objects[-1]).__name__}, expected an object of columns")
    return objects


def _json(path: Path, text: str) -> Columns:
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise UserError(f"{path}: the JSON is nested too deeply") from error
    except ValueError as error:
        # Hugging Face's to_json writes one object a line under this ending.
        first = text.lstrip().split("\n", 1)[0].strip()
        if first.startswith("{") and first.endswith("}"):
            return _from_objects(path, _json_lines(path, text))
        raise UserError(f"{path}: not JSON: {_first_line(error)}") from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
        if content and all(isinstance(item, dict) and "paragraphs" in item for item in content):
            return _squad_json(path, content)
    elif isinstance(content, dict) and "\n" not in text.strip():
        content = [content]
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise UserError(f"{path}: expected a list of objects, one object a line, or SQuAD's data/paragraphs/qas")
    return _from_objects(path, content)


def _from_objects(path: Path, objects: Sequence[dict[str, Any]]) -> Columns:
    names = dict.fromkeys(name for item in objects for name in item)
    return {name: [item.get(name) for item in objects] for name in names}


def _squad_json(path: Path, articles: Sequence[dict[str, Any]]) -> Columns:
    columns: Columns = {"id": [], "context": [], "question": [], "answers": []}
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for item in paragraph["qas"]:
                    answers = item.get("answers") or []
                    columns["id"].append(item["id"])
                    columns["context"].append(paragraph["context"])
                    columns["question"].append(item["question"])
                    columns["answers"].append({key: [a[key] for a in answers] for key in ("text", "answer_start")})
    except (KeyError, TypeError, AttributeError) as error:
        where = f"question {len(columns['answers']) + 1}"
        raise UserError(f"{path}: broken SQuAD JSON at {where}: {type(error).__name__} {error}") from error
    return columns


_LFS = "version https://git-lfs"
_LFS_ADVICE = "the file is a Git LFS pointer, not the data; fetch it with `git lfs pull`"


def _looks(path: Path) -> str:
    """What a file that is not parquet looks like instead, to help find the mistake."""
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
    except OSError:
        return ""
    if not start:
        return "; the file is empty"
    if start.startswith(_LFS.encode()):
        return f"; {_LFS_ADVICE}"
    return "" if start.startswith(b"PAR1") else f"; it begins with {start[:32]!r}"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).split("\n", 1)[0]
