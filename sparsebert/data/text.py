"""Plain text for masked language modelling: read, packed to blocks of tokens, masked anew every epoch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from sparsebert.data.digest import sha256_file
from sparsebert.data.read import check_texts, read_columns, read_text
from sparsebert.errors import UserError

__all__ = ["MaskedText", "PackedText", "TextData", "load_text", "pack_text"]

_LINES = (".txt", ".raw", ".tokens")
_COLUMN = (".parquet", ".jsonl", ".csv")
_HELD_OUT = re.compile(r"(wiki\.)?(validation|valid|val|dev|eval|test)(?![a-z])", re.IGNORECASE)
_HELD_OUT_EVERY = 20
_SHORTEST_BLOCK = 8
_PARAGRAPHS_AT_ONCE = 1000
_MASKED, _REPLACED = 0.8, 0.1


@dataclass
class TextData:
    """Paragraphs of text: stripped, none blank, in the order of the files."""

    train: list[str]
    held_out: list[str]
    """Paragraphs of files that are for watching alone; [] where `pack_text` is to hold out blocks of `train`."""
    fingerprint: dict[str, Any]
    """Plain values that name the text: under "train" and "held_out" the files with SHA-256 and paragraphs."""


@dataclass
class PackedText:
    """Text as blocks of tokens, `[blocks, length]` int32, each with the special tokens at its ends."""

    train: np.ndarray
    held_out: np.ndarray
    """Blocks for watching alone; at least one."""
    fingerprint: dict[str, Any]
    """That of the text, with "block_length" and "blocks" (train, held out), and "held_out_every" where blocks of the
    training text were held out."""

    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """What to train on, and what is held out."""
        return self.train, self.held_out


def load_text(paths: Sequence[str | Path]) -> TextData:
    """The text of files and folders, one after the other.

    A paragraph is a line that is not blank: of a .txt file (also .raw and .tokens, as WikiText's are called), or of the
    column `text` of a .parquet, .jsonl or .csv file. WikiText's heading lines (" = Title = ") are paragraphs like any
    other. Of a folder all such files below it are read, sorted by path; hidden ones are passed over.

    A file whose name begins with the word validation, valid, val, dev, eval or test ("wiki.valid.raw" too) is held out,
    whichever path it came by, and every other file is for training. Where there are only files with such names, there
    is nothing to hold them out from: all are for training. Without a held-out file `pack_text` holds out blocks.

    Args:
        paths: files or folders.

    Raises:
        UserError: a path that does not exist, a folder without text files, a file of another kind or given twice, and
            whatever is wrong inside one: no column `text`, rows without text, not UTF-8, empty.
    """
    if isinstance(paths, str | Path):
        paths = (paths,)
    if not paths:
        raise UserError("text: expected at least one file or folder, got none")
    files = [file for path in paths for file in _files(Path(path).expanduser())]
    seen: set[Path] = set()
    for path, _ in files:
        if path.resolve() in seen:
            raise UserError(f"text: {path} is given twice; leave one of them out")
        seen.add(path.resolve())
    held_out = {path for path, _ in files if _HELD_OUT.match(path.name)}
    if len(held_out) == len(files):
        held_out = set()
    parts: dict[str, list[str]] = {"train": [], "held_out": []}
    fingerprint: dict[str, Any] = {}
    for path, name in files:
        part = "held_out" if path in held_out else "train"
        found = _paragraphs(path)
        parts[part] += found
        about = {"file": name, "sha256": sha256_file(path), "paragraphs": len(found)}
        fingerprint.setdefault(part, []).append(about)
    return TextData(parts["train"], parts["held_out"], fingerprint)


def pack_text(text: TextData, tokenizer: PreTrainedTokenizerBase, block_length: int) -> PackedText:
    """Text as blocks of `block_length` tokens without padding, as BERT's and RoBERTa's pre-training has it.

    Paragraphs are tokenised one by one without special tokens and joined with nothing between them; every
    `block_length - 2` tokens become a block, [CLS] before and [SEP] after them, wherever a sentence ends. The rest at
    the end that fills no block is dropped. Where no file is held out, every 20th block is (the last one, if there are
    fewer).

    Args:
        text: from `load_text`.
        tokenizer: the model's, with a CLS and a SEP token.
        block_length: tokens of a block with its two special ones; at least 8, at most what the tokenizer says that
            the model takes.

    Raises:
        UserError: a block length out of range, a tokenizer without the special tokens, or text that is too short for
            one block to train on and one to hold out.
    """
    if block_length < _SHORTEST_BLOCK:
        raise UserError(f"text_length: expected blocks of at least {_SHORTEST_BLOCK} tokens, got {block_length}")
    if block_length > tokenizer.model_max_length:
        raise UserError(f"text_length: the model takes at most {tokenizer.model_max_length} tokens, got {block_length}")
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise UserError("tokenizer: it has no CLS or no SEP token, which every block of text begins and ends with")
    fingerprint = {**text.fingerprint, "block_length": block_length}
    if text.held_out:
        train = _blocks(text.train, tokenizer, block_length, 1, "to train on")
        held_out = _blocks(text.held_out, tokenizer, block_length, 1, "of the held-out files")
    else:
        blocks = _blocks(text.train, tokenizer, block_length, 2, "to train on and to hold out")
        held = np.zeros(len(blocks), bool)
        held[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY] = True
        held[-1] |= not held.any()
        train, held_out = blocks[~held], blocks[held]
        fingerprint["held_out_every"] = _HELD_OUT_EVERY
    fingerprint["blocks"] = {"train": len(train), "held_out": len(held_out)}
    return PackedText(train, held_out, fingerprint)


class MaskedText(torch.utils.data.Dataset[dict[str, Any]]):
    """Packed text as examples of masked language modelling; an item is a dict of lists for `Collator`.

    An item has `input_ids`, `attention_mask` (all ones), `token_type_ids` (all zeros) where the tokenizer gives them,
    and `labels`: the token where it is to be predicted, else -100. In each block a share of the tokens that are not
    special is chosen, rounded and at least one (Devlin et al., 2019): of these 80 % become the mask token, 10 % a token
    drawn from all that are not special, and 10 % stay.

    Every epoch has a new order and new masks. Both are functions of seed, epoch and block alone, so a resumed run sees
    what the first would have seen, however many workers read. Read in sequence: Trainer's
    `train_sampling_strategy="sequential"`, which calls `set_epoch`; without that call, as for an evaluation, every
    reading sees the same masks.

    Args:
        blocks: `[blocks, length]` int32, a part of `PackedText`.
        tokenizer: that packed them.
        seed: of order and masks, 0 to 2**32 - 1.
        probability: share of the tokens to predict, in [0, 1); 0 leaves the text as it is, with all labels -100.

    Raises:
        UserError: a probability or seed out of range, or a tokenizer without a mask token where one is needed.
    """

    def __init__(
        self, blocks: np.ndarray, tokenizer: PreTrainedTokenizerBase, seed: int, probability: float = 0.15
    ) -> None:
        # Written so that NaN fails too.
        if not 0.0 <= probability < 1.0:
            raise UserError(f"probability: expected at least 0 and below 1, got {probability:g}")
        if probability and tokenizer.mask_token_id is None:
            raise UserError("tokenizer: it has no mask token, which masked language modelling needs")
        if not 0 <= seed < 2**32:
            raise UserError(f"seed: expected 0 to {2**32 - 1}, got {seed}")
        self.blocks = blocks
        self.seed = seed
        self.probability = probability
        # A few numbers and not the tokenizer, so that workers get them cheaply.
        self._special = np.array(sorted(set(tokenizer.all_special_ids)), np.int32)
        self._tokens = np.setdiff1d(np.array(list(tokenizer.get_vocab().values()), np.int32), self._special)
        self._mask = tokenizer.mask_token_id
        self._types = "token_type_ids" in tokenizer.model_input_names
        self._stream = np.random.RandomState()  # to be seeded anew takes a tenth of the time of a new one
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draws the order of an epoch, and says whose masks `[]` gives; Trainer calls it."""
        self.epoch = epoch
        self.order = np.random.RandomState([self.seed, epoch]).permutation(len(self.blocks))

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, position: int) -> dict[str, Any]:
        block = int(self.order[position])
        ids, labels = self._masked(block)
        item = {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)}
        if self._types:
            item["token_type_ids"] = [0] * len(ids)
        return item | {"labels": labels.tolist()}

    def _masked(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """A block's input and labels, `[length]` each."""
        ids = self.blocks[block].copy()
        labels = np.full_like(ids, -100)
        places = np.flatnonzero(~np.isin(ids, self._special))
        if not self.probability or not len(places):
            return ids, labels
        stream = self._stream
        stream.seed([self.seed, self.epoch, block])
        chosen = stream.permutation(places)[: max(1, round(self.probability * len(places)))]
        labels[chosen] = ids[chosen]
        kind = stream.random_sample(len(chosen))
        others = self._tokens[(stream.random_sample(len(chosen)) * len(self._tokens)).astype(np.int64)]
        replaced = (kind >= _MASKED) & (kind < _MASKED + _REPLACED)
        ids[chosen[kind < _MASKED]] = self._mask
        ids[chosen[replaced]] = others[replaced]
        return ids, labels


def _files(path: Path) -> Iterator[tuple[Path, str]]:
    """The text files that a path means, each with the name that a result gives it."""
    if path.is_file():
        if path.suffix.lower() not in (*_LINES, *_COLUMN):
            raise UserError(f"text: {path}: expected a file ending in {', '.join((*_LINES, *_COLUMN))}")
        yield path, path.name
        return
    if not path.is_dir():
        raise UserError(f"text: {path} does not exist")
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in (*_LINES, *_COLUMN)
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not found:
        raise UserError(f"text: {path} holds no file ending in {', '.join((*_LINES, *_COLUMN))}")
    yield from ((file, file.relative_to(path).as_posix()) for file in found)


def _paragraphs(path: Path) -> list[str]:
    """The lines of a file that are not blank."""
    if path.suffix.lower() in _LINES:
        rows = [read_text(path)]
    else:
        rows = read_columns(path, ["text"])[0]["text"]
        check_texts(rows, str(path), "text")
    # Split at line feeds alone: str.splitlines would also break at U+2028 and the like inside a sentence.
    return [line.strip() for row in rows for line in row.split("\n") if line.strip()]


def _blocks(
    paragraphs: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, least: int, purpose: str
) -> np.ndarray:
    """`[blocks, length]` int32, all tokens in order but for those after the last whole block."""
    parts = [np.empty(0, np.int32)]
    for first in range(0, len(paragraphs), _PARAGRAPHS_AT_ONCE):
        batch = tokenizer(
            list(paragraphs[first : first + _PARAGRAPHS_AT_ONCE]),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # a paragraph longer than the model takes is cut here
        )
        parts.append(np.fromiter(chain.from_iterable(batch["input_ids"]), np.int32))
    tokens, room = np.concatenate(parts), length - 2
    count = len(tokens) // room
    if count < least:
        raise UserError(
            f"text: the text {purpose} has {len(tokens):,} tokens, and {least * room:,} are needed for {least} "
            f"block{'s' if least > 1 else ''} of {length} (two of them special); give more text or shorter blocks"
        )
    blocks = np.empty((count, length), np.int32)
    blocks[:, 0], blocks[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    blocks[:, 1:-1] = tokens[: count * room].reshape(count, room)
    return blocks
