"""Plain text: which files it is, how it is packed to blocks, and how they are masked."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments

from sparsebert.data import Collator, MaskedText, TextData, load_text, pack_text
from sparsebert.errors import UserError

TOKENIZER = tiny.tokenizer()
TOKENIZER.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
FIRST_WORD = tiny.WORDS.index("[MASK]") + 1
WORDS = tiny.WORDS[FIRST_WORD:]
WIKITEXT = "\n = The Film = \n \n the plot was very good . \n \n = = Plot = = \n \n the film is bad \n\n"


def text_of(words, held_out=()) -> TextData:
    """Ten words a paragraph."""
    parts = [[" ".join(part[n : n + 10]) for n in range(0, len(part), 10)] for part in (list(words), list(held_out))]
    return TextData(*parts, {})


def blocks_of(count: int, length: int) -> np.ndarray:
    """Random packed text without unknown words."""
    blocks = np.random.RandomState(1).randint(FIRST_WORD, len(tiny.WORDS), (count, length)).astype(np.int32)
    blocks[:, 0], blocks[:, -1] = 2, 3
    return blocks


# Files


@pytest.mark.parametrize("name", ["a.txt", "wiki.train.raw", "wiki.train.tokens"])
def test_wikitext_lines(tmp_path, name) -> None:
    path = tmp_path / name
    path.write_text(WIKITEXT, encoding="utf-8")
    text = load_text([str(path)])
    assert text.train == ["= The Film =", "the plot was very good .", "= = Plot = =", "the film is bad"]
    assert text.held_out == []
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert text.fingerprint == {"train": [{"file": name, "sha256": digest, "paragraphs": 4}]}


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_a_column_of_text(tmp_path, write, ending) -> None:
    """Rows may be lines, as in WikiText, or whole articles."""
    rows = ["", " = The Film = \n", "", " very good \n", "one\n\ntwo\u2028three"]
    path = write(tmp_path / f"a.{ending}", {"title": list("abcde"), "text": rows})
    assert load_text([path]).train == ["= The Film =", "very good", "one", "two\u2028three"]
    assert load_text(path) == load_text([path])


def test_folders_in_order_and_what_is_held_out(tmp_path, write) -> None:
    for name in (
        "b.txt",
        "sub/a.txt",
        "valid-00001.txt",
        "sub/Dev.txt",
        "wiki.test.raw",
        "devices.txt",
        "testimony.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "c.txt").write_text("hidden")
    (tmp_path / "about.json").write_text("{}")
    write(tmp_path / "validation.parquet", {"text": ["validation.parquet"]})
    text = load_text([tmp_path])
    assert text.train == ["b.txt", "devices.txt", "sub/a.txt", "testimony.txt"]
    assert text.held_out == ["sub/Dev.txt", "valid-00001.txt", "validation.parquet", "wiki.test.raw"]
    assert [file["file"] for file in text.fingerprint["held_out"]] == text.held_out
    assert json.loads(json.dumps(text.fingerprint)) == text.fingerprint
    assert str(tmp_path) not in json.dumps(text.fingerprint)


def test_only_held_out_names_are_no_names(tmp_path) -> None:
    """Several paths are one text: validation and test alone are held out beside others, else trained on."""
    for name in ("one/validation.txt", "one/test.txt", "two/all.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    alone, both = load_text([tmp_path / "one"]), load_text([tmp_path / "one", tmp_path / "two"])
    assert (alone.train, alone.held_out) == (["one/test.txt", "one/validation.txt"], [])
    assert (both.train, both.held_out) == (["two/all.txt"], ["one/test.txt", "one/validation.txt"])
    assert load_text([tmp_path / "one" / "test.txt"]).train == ["one/test.txt"]


def test_what_is_no_text(tmp_path, write) -> None:
    (tmp_path / "folder").mkdir()
    good = tmp_path / "a.txt"
    good.write_text("good")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "a.pdf").write_text("x")
    write(tmp_path / "label.csv", {"label": ["a"]})
    write(tmp_path / "none.jsonl", {"text": ["a", None]})
    write(tmp_path / "blank.csv", {"text": ["", " "]})
    write(tmp_path / "number.jsonl", {"text": [3]})
    cases = [
        ([], r"text: expected at least one file or folder"),
        (["absent"], r"text: .*absent does not exist"),
        (["folder"], r"text: .*folder holds no file ending in \.txt"),
        (["a.pdf"], r"text: .*a.pdf: expected a file ending in \.txt"),
        (["a.txt", "."], r"text: .*a.txt is given twice"),
        (["latin.txt"], r"latin.txt: not UTF-8"),
        (["empty.txt"], r"empty.txt: the file is empty"),
        (["label.csv"], r"label.csv: no column 'text'; the columns there are 'label'"),
        (["none.jsonl"], r"none.jsonl: 1 of 2 rows have no text in column 'text': row 2"),
        (["blank.csv"], r"blank.csv: column 'text' is blank in all 2 rows"),
        (["number.jsonl"], r"number.jsonl: column 'text' holds int in row 1"),
    ]
    for names, message in cases:
        with pytest.raises(UserError, match=message):
            load_text([tmp_path / name for name in names])


# Packing


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from(WORDS), max_size=400),
    st.lists(st.sampled_from(WORDS), max_size=60),
    st.integers(8, 24),
)
def test_every_token_once_and_in_order(words, held_out, length) -> None:
    text, room = text_of(words, held_out), length - 2
    counts = len(words) // room, len(held_out) // room
    if (held_out and not all(counts)) or (not held_out and counts[0] < 2):
        with pytest.raises(UserError, match=r"text: the text .* tokens, and .* are needed"):
            pack_text(text, TOKENIZER, length)
        return
    packed = pack_text(text, TOKENIZER, length)
    train, held = packed.parts()
    assert train.dtype == held.dtype == np.int32
    assert packed.fingerprint["blocks"] == {"train": len(train), "held_out": len(held)}
    assert packed.fingerprint["block_length"] == length
    for blocks in (train, held):
        assert blocks.shape[1:] == (length,) and len(blocks)
        assert (blocks[:, 0] == 2).all() and (blocks[:, -1] == 3).all()
    if held_out:
        assert (len(train), len(held)) == counts
    else:
        total = len(train) + len(held)
        places = list(range(19, total, 20)) or [total - 1]
        assert total == counts[0] and len(held) == len(places)
        train, held = np.insert(train, [p - n for n, p in enumerate(places)], held, axis=0), train[:0]
        assert packed.fingerprint["held_out_every"] == 20
    for blocks, source in ((train, words), (held, held_out)):
        ids = [tiny.WORDS.index(word) for word in source]
        assert blocks[:, 1:-1].ravel().tolist() == ids[: len(blocks) * room]


def test_many_long_and_short_paragraphs(caplog: pytest.LogCaptureFixture) -> None:
    """More paragraphs than are tokenised at once, one longer than any model takes, and no warning about it."""
    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = 16
    text = TextData([*["the film"] * 2500, " ".join(["bad"] * 5000), "good"], [], {})
    packed = pack_text(text, tokenizer, 12)
    assert len(packed.train) + len(packed.held_out) == (2 * 2500 + 5000 + 1) // 10
    assert not caplog.records


def test_what_cannot_be_packed() -> None:
    text, tokenizer = text_of(WORDS * 10), tiny.tokenizer()
    tokenizer.model_max_length = 20
    with pytest.raises(UserError, match="text_length: expected blocks of at least 8 tokens, got 7"):
        pack_text(text, tokenizer, 7)
    with pytest.raises(UserError, match="text_length: the model takes at most 20 tokens, got 21"):
        pack_text(text, tokenizer, 21)
    with pytest.raises(
        UserError, match=r"to train on and to hold out has 16 tokens, and 36 are needed for 2 blocks of 20"
    ):
        pack_text(text_of(WORDS), tokenizer, 20)
    with pytest.raises(UserError, match=r"to train on has 16 tokens, and 18 are needed for 1 block of 20"):
        pack_text(text_of(WORDS, WORDS), tokenizer, 20)
    with pytest.raises(UserError, match=r"of the held-out files has 1 tokens, and 18 are needed"):
        pack_text(text_of(WORDS * 2, WORDS[:1]), tokenizer, 20)
    tokenizer.sep_token = None
    with pytest.raises(UserError, match="no CLS or no SEP token"):
        pack_text(text, tokenizer, 8)


# Masking


def read(data: MaskedText) -> list[dict[str, Any]]:
    return [data[position] for position in range(len(data))]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(8, 40), st.floats(0.01, 0.99), st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_what_is_masked(count, length, probability, seed, epoch) -> None:
    blocks = blocks_of(count, length)
    data = MaskedText(blocks, TOKENIZER, seed, probability)
    data.set_epoch(epoch)
    items = read(data)
    assert len(items) == count == len(set(data.order.tolist()))
    for block, item in zip(data.order, items, strict=True):
        assert list(item) == ["input_ids", "attention_mask", "token_type_ids", "labels"]
        assert item["attention_mask"] == [1] * length and item["token_type_ids"] == [0] * length
        chosen = [place for place, label in enumerate(item["labels"]) if label != -100]
        assert len(chosen) == max(1, round(probability * (length - 2)))
        assert 0 not in chosen and length - 1 not in chosen
        for place, (was, now, label) in enumerate(zip(blocks[block], item["input_ids"], item["labels"], strict=True)):
            assert label == was if place in chosen else now == was
            assert now == TOKENIZER.mask_token_id or now >= FIRST_WORD or place in (0, length - 1)


def test_a_function_of_seed_epoch_and_block_alone() -> None:
    blocks = blocks_of(40, 16)
    data, again = MaskedText(blocks, TOKENIZER, 7), MaskedText(blocks, TOKENIZER, 7)
    first = read(data)
    for epoch in (1, 2):
        data.set_epoch(epoch)
        read(data)
    again.set_epoch(2)
    assert read(again)[::-1] == [data[position] for position in reversed(range(40))]
    assert data[0] == data[0] and data[-1] == data[39]
    data.set_epoch(0)
    assert read(data) == first
    other = MaskedText(blocks, TOKENIZER, 8)
    assert other.order.tolist() != data.order.tolist()
    by_block = {int(block): item for block, item in zip(data.order, first, strict=True)}
    again.set_epoch(1)
    for changed in (other, again):
        same = sum(by_block[int(block)] == item for block, item in zip(changed.order, read(changed), strict=True))
        assert same < 8
    # The masks of a block do not depend on what else there is.
    fewer = MaskedText(blocks[:10], TOKENIZER, 7)
    assert all(by_block[int(block)] == item for block, item in zip(fewer.order, read(fewer), strict=True))


def test_the_masks_do_not_change_between_releases() -> None:
    item = MaskedText(np.array([[2, *range(5, 19), 3]], np.int32), TOKENIZER, 1, 0.5)[0]
    chosen = [(now, was) for now, was in zip(item["input_ids"], item["labels"], strict=True) if was != -100]
    assert chosen == [(4, 7), (4, 8), (9, 9), (4, 14), (11, 15), (4, 16), (4, 17)]


def test_eighty_ten_ten() -> None:
    blocks = blocks_of(300, 102)
    kinds: Counter[str] = Counter()
    replaced: Counter[int] = Counter()
    places: Counter[int] = Counter()
    for item in read(MaskedText(blocks, TOKENIZER, 3, 0.3)):
        for place, (now, label) in enumerate(zip(item["input_ids"], item["labels"], strict=True)):
            if label != -100:
                places[place] += 1
                kinds["mask" if now == 4 else "same" if now == label else "other"] += 1
                if now not in (4, label):
                    replaced[now] += 1
    total = 300 * 30
    assert sum(kinds.values()) == total
    # A token drawn at random is the old one once in 16 times.
    for kind, share in {"mask": 0.8, "other": 0.1 * 15 / 16, "same": 0.1 + 0.1 / 16}.items():
        assert abs(kinds[kind] - share * total) < 5 * math.sqrt(total * share * (1 - share)), kind
    assert set(replaced) == set(range(FIRST_WORD, len(tiny.WORDS)))
    assert max(replaced.values()) < 3 * min(replaced.values())
    assert set(places) == set(range(1, 101)) and max(places.values()) < 140


def test_special_tokens_in_the_text_are_left_alone() -> None:
    blocks = blocks_of(20, 16)
    blocks[:, 4:9] = [0, 1, 2, 3, 4]
    for item in read(MaskedText(blocks, TOKENIZER, 0, 0.9)):
        assert item["input_ids"][4:9] == [0, 1, 2, 3, 4] and item["labels"][4:9] == [-100] * 5
    nothing = np.ones((2, 8), np.int32)
    assert all(set(item["labels"]) == {-100} for item in read(MaskedText(nothing, TOKENIZER, 0)))


def test_unmasked() -> None:
    tokenizer, blocks = tiny.tokenizer(), blocks_of(9, 12)
    tokenizer.mask_token = None
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    data = MaskedText(blocks, tokenizer, 5, 0.0)
    for block, item in zip(data.order, read(data), strict=True):
        assert item == {"input_ids": blocks[block].tolist(), "attention_mask": [1] * 12, "labels": [-100] * 12}
    with pytest.raises(UserError, match="tokenizer: it has no mask token"):
        MaskedText(blocks, tokenizer, 5)


@pytest.mark.parametrize("probability", [-0.1, 1.0, math.nan])
def test_wrong_shares_and_seeds(probability) -> None:
    with pytest.raises(UserError, match="probability: expected at least 0 and below 1, got"):
        MaskedText(blocks_of(2, 8), TOKENIZER, 0, probability)
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match="seed: expected 0 to 4294967295"):
            MaskedText(blocks_of(2, 8), TOKENIZER, seed)


def test_batches() -> None:
    data = MaskedText(blocks_of(3, 11), TOKENIZER, 0)
    batch = Collator(TOKENIZER, pad_to_multiple_of=8)(read(data))
    assert {name: (tuple(values.shape), values.dtype) for name, values in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids", "labels"), ((3, 16), torch.int64)
    )
    assert (batch["labels"][:, 11:] == -100).all() and (batch["attention_mask"][:, 11:] == 0).all()


class Recorder(torch.nn.Module):
    """Keeps the batches it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []

    def forward(self, input_ids, attention_mask, token_type_ids, labels):
        self.seen.append(torch.stack([input_ids, labels]))
        return {"loss": self.weight}


@pytest.mark.parametrize("workers", [0, 1])
def test_trainer_reads_epoch_by_epoch_and_goes_on_in_the_middle(tmp_path, workers) -> None:
    def trained(**options: Any) -> list[torch.Tensor]:
        model = Recorder()
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=9, save_steps=5, use_cpu=True,
            train_sampling_strategy="sequential", remove_unused_columns=False, report_to="none", disable_tqdm=True,
            dataloader_num_workers=workers, dataloader_pin_memory=False,
        )  # fmt: skip
        data = MaskedText(blocks_of(16, 10), TOKENIZER, 1)
        Trainer(model, arguments, data_collator=Collator(TOKENIZER), train_dataset=data).train(**options)
        return model.seen

    seen = trained()
    data = MaskedText(blocks_of(16, 10), TOKENIZER, 1)
    for step, batch in enumerate(seen):
        data.set_epoch(step // 4)
        items = [data[position] for position in range(step % 4 * 4, step % 4 * 4 + 4)]
        assert batch.tolist() == [[item["input_ids"] for item in items], [item["labels"] for item in items]]
    resumed = trained(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert [batch.tolist() for batch in resumed] == [batch.tolist() for batch in seen[5:]]
