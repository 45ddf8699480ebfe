from __future__ import annotations

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsebert.data.read import ENDINGS, read_columns
from sparsebert.errors import UserError

TEXTS = ["plain", "with, comma", '"quoted" here', "it's", "ümlaut \u2028 separator", " blank around "]


def text_file(tmp_path, name, content, encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(content.encode(encoding) if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_gives_the_same(tmp_path, write, ending) -> None:
    path = write(tmp_path / f"a{ending}", {"text": TEXTS, "label": [str(n) for n in range(6)], "more": ["x"] * 6})
    columns, dropped = read_columns(path, ("label", "text"))
    assert columns == {"label": [str(n) for n in range(6)], "text": TEXTS}
    assert dropped == 0


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_missing_column_is_named_with_those_there(tmp_path, write, ending) -> None:
    path = write(tmp_path / f"a{ending}", {"text": ["a"], "gold": ["1"]})
    with pytest.raises(UserError, match=rf"a{ending}: no column 'label'; the columns there are 'text', 'gold'"):
        read_columns(path, ("text", "label"))
    with pytest.raises(UserError, match="no columns 'x', 'y'"):
        read_columns(path, ("x", "y"))


@pytest.mark.parametrize("ending", ENDINGS)
def test_renamed_and_optional_columns(tmp_path, write, ending) -> None:
    path = write(tmp_path / f"a{ending}", {"text": ["a"], "gold": ["1"], "id": ["7"]})
    renames = {"label": "gold", "text": "absent"}
    assert read_columns(path, ("text", "label"), renames)[0] == {"text": ["a"], "label": ["1"]}
    assert read_columns(path, ("text",), optional=("id", "none"))[0] == {"text": ["a"], "id": ["7"]}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(rows=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1, max_size=5))
def test_csv_and_jsonl_give_back_any_text(tmp_path, write, rows) -> None:
    for ending in (".csv", ".jsonl", ".json"):
        path = write(tmp_path / f"a{ending}", {"text": rows, "label": ["1"] * len(rows)})
        assert read_columns(path, ("text",))[0]["text"] == rows


def test_tsv_takes_quotes_as_they_are(tmp_path) -> None:
    path = text_file(tmp_path, "a.tsv", 'text\tlabel\r\n"never closed\t1\r\nit ""is""\t0\r\n')
    assert read_columns(path, ("text", "label"))[0] == {"text": ['"never closed', 'it ""is""'], "label": ["1", "0"]}


def test_byte_order_mark_and_blank_lines(tmp_path) -> None:
    path = text_file(tmp_path, "a.csv", "\ufefftext,label\n\na,1\n\nb,0\n\n")
    assert read_columns(path, ("text", "label"))[0] == {"text": ["a", "b"], "label": ["1", "0"]}
    path = text_file(tmp_path, "a.jsonl", '\n{"text": "a"}\n\n{"text": "b"}\n')
    assert read_columns(path, ("text",))[0] == {"text": ["a", "b"]}


def test_a_field_may_be_long_and_the_modules_limit_is_left_alone(tmp_path, write) -> None:
    before = csv.field_size_limit()
    path = write(tmp_path / "a.csv", {"text": ["word " * 100_000], "label": ["1"]})
    assert len(read_columns(path, ("text",))[0]["text"][0]) == 500_000
    assert csv.field_size_limit() == before


def test_headerless_tsv(tmp_path) -> None:
    header = ("source", "label", "star", "sentence")
    path = text_file(tmp_path, "a.tsv", "gj04\t1\t\tOur friends.\ngj04\t0\t*\tThem friends.\n")
    assert read_columns(path, ("sentence", "label"), header=header)[0] == {
        "sentence": ["Our friends.", "Them friends."], "label": ["1", "0"]
    }  # fmt: skip
    path = text_file(tmp_path, "b.tsv", "sentence\tlabel\nOur friends.\t1\n")
    assert read_columns(path, ("sentence", "label"), header=header)[0] == {"sentence": ["Our friends."], "label": ["1"]}


def test_short_tsv_rows_are_dropped_only_where_asked(tmp_path) -> None:
    path = text_file(tmp_path, "a.tsv", "a\tb\tlabel\nx\ty\t1\nbroken\nz\tw\t0\n")
    assert read_columns(path, ("a", "label"), drop_short=True) == ({"a": ["x", "z"], "label": ["1", "0"]}, 1)
    with pytest.raises(UserError, match="line 3 has 1 fields, the header has 3"):
        read_columns(path, ("a", "label"))


def test_json_layouts(tmp_path) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    expected = {"text": ["a", "b"], "label": [1, 0]}
    for content in (json.dumps(rows, indent=1), json.dumps({"data": rows}), "\n".join(map(json.dumps, rows))):
        assert read_columns(text_file(tmp_path, "a.json", content), ("text", "label"))[0] == expected
    one = text_file(tmp_path, "a.json", json.dumps(rows[0]))
    assert read_columns(one, ("text", "label"))[0] == {"text": ["a"], "label": [1]}


def test_squad_json(tmp_path) -> None:
    paragraph = {
        "context": "The house is red.",
        "qas": [
            {"id": "1", "question": "Which?", "answers": [{"text": "red", "answer_start": 13}], "is_impossible": False},
            {"id": "2", "question": "Why?", "answers": [], "plausible_answers": [{"text": "x"}], "is_impossible": True},
        ],
    }
    content = {"version": "v2.0", "data": [{"title": "T", "paragraphs": [paragraph]}]}
    columns, _ = read_columns(text_file(tmp_path, "a.json", json.dumps(content)), ("id", "context", "answers"))
    assert columns == {
        "id": ["1", "2"],
        "context": ["The house is red."] * 2,
        "answers": [{"text": ["red"], "answer_start": [13]}, {"text": [], "answer_start": []}],
    }
    del paragraph["qas"][1]["question"]
    with pytest.raises(UserError, match="broken SQuAD JSON at question 2: KeyError 'question'"):
        read_columns(text_file(tmp_path, "a.json", json.dumps(content)), ("id",))


def test_class_names_stored_in_parquet_are_used(tmp_path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    data = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    data.to_parquet(tmp_path / "a.parquet")
    assert read_columns(tmp_path / "a.parquet", ("label",))[0] == {"label": ["good", "bad", None]}


BROKEN = {
    "text.parquet": ("hello, this is text", "not a readable parquet file.*begins with b'hello, this is text'"),
    "empty.parquet": ("", "not a readable parquet file.*the file is empty"),
    "pointer.parquet": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "cut.parquet": (b"PAR1 and then nothing", "not a readable parquet file"),
    "pointer.csv": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "really.csv": (b"PAR1\0\0", "the file is parquet; rename"),
    "zip.csv": (b"PK\x03\x04xxxx", "compressed; unpack"),
    "gz.jsonl": (b"\x1f\x8b\x08", "compressed; unpack"),
    "latin.csv": ("text,label\nfine,1\ncaf\xe9,1\n".encode("latin-1"), "not UTF-8 text .byte 21, line 3."),
    "empty.csv": ("", "the file is empty"),
    "blank.tsv": (" \n\n", "the file is empty"),
    "wide.csv": ("text,label\na,1\nb, c,0\n", "line 3 has 3 fields, the header has 2"),
    "narrow.csv": ("text,label\na,1\nb\n", "line 3 has 1 fields, the header has 2"),
    "open.csv": ('text,label\na,1\n"b,0\nc,1\n', "broken csv in the row that begins at line 3: unexpected end"),
    "stray.csv": ('text,label\na,1\n"b"x,0\n', "broken csv in the row that begins at line 3"),
    "twice.csv": ("text,text,label\na,b,1\n", "names 'text' more than once"),
    "wide.tsv": ("text\tlabel\na\tb\t1\n", "line 2 has 3 fields, the header has 2 .tsv has no quoting"),
    "bad.jsonl": ('{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    "list.jsonl": ('{"text": "a"}\n[1]\n', "line 2 is a list, expected an object"),
    "bad.json": ('[{"text": "a"},', "not JSON"),
    "lines.json": ('{"text": "a"}\n{"text": oops}\n', "line 2 is not JSON"),
    "number.json": ("3", "expected a list of objects"),
    "columns.json": ('{"text":\n ["a"], "label": [1]}', "expected a list of objects"),
    "deep.json": ("[" * 200_000, "nested too deeply|not JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_with_the_cause(tmp_path, name) -> None:
    content, message = BROKEN[name]
    path = text_file(tmp_path, name, content)
    with pytest.raises(UserError, match=message) as caught:
        read_columns(path, ("text", "label"))
    assert str(caught.value).startswith(str(path))


def test_a_truncated_parquet_file(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["word"] * 1000, "label": list(range(1000))}), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"a.parquet: not a readable parquet file"):
        read_columns(path, ("text", "label"))


def test_other_endings_and_absent_files(tmp_path) -> None:
    with pytest.raises(UserError, match=r"a.xlsx: expected a file ending in .parquet"):
        read_columns(text_file(tmp_path, "a.xlsx", "x"), ("text",))
    with pytest.raises(UserError, match="no such file"):
        read_columns(tmp_path / "absent.csv", ("text",))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match="no such file"):
        read_columns(tmp_path / "folder.csv", ("text",))


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch) -> None:
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    path = text_file(tmp_path, "a.csv", "text,label\na,1\n")
    monkeypatch.setattr(type(path), "read_bytes", refuse)
    with pytest.raises(UserError, match=r"a.csv: cannot be read: Permission denied"):
        read_columns(path, ("text",))
