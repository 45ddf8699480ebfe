"""Small files and a small tokenizer, all made in the test's own folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

Columns = dict[str, list[Any]]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def _write(path: Path, columns: Columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    match path.suffix:
        case ".parquet":
            pq.write_table(pa.table(columns), path)
        case ".csv":
            with path.open("w", encoding="utf-8", newline="") as stream:
                writer = csv.writer(stream)
                writer.writerows([list(columns), *(row.values() for row in rows)])
        case ".tsv":
            lines = ["\t".join(columns), *("\t".join(str(value) for value in row.values()) for row in rows)]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        case ".json":
            path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture
def write() -> Callable[[Path, Columns], Path]:
    """write(path, columns): a file in the format of its ending."""
    return _write


@pytest.fixture
def sst2() -> Callable[[int], Columns]:
    """sst2(n): columns of n rows with different texts, classes in turn."""
    return lambda n: {
        "sentence": [f"sentence number {row}, with a comma" for row in range(n)],
        "label": [row % 2 for row in range(n)],
        "idx": list(range(n)),
    }


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A BERT-like WordPiece tokenizer over letters and a few words: every lower-case text has known tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["who", "what", "is", "the", "red", "green", "blue", "house", "answer"]
    vocab = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *".,!?$", *words]
    inner = Tokenizer(models.WordPiece({word: number for number, word in enumerate(vocab)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in names.items()},
    )
