"""Tiny random models of each kind with a tokenizer, saved as checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

KINDS = ("bert", "roberta", "distilbert")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "##s", "the", "a", "very"]


def tiny_config(kind: str) -> BertConfig | RobertaConfig | DistilBertConfig:
    """Two layers, two heads, width 8; every size different, so that a mix-up shows."""
    if kind == "distilbert":
        return DistilBertConfig(
            vocab_size=20, dim=8, n_layers=2, n_heads=2, hidden_dim=12, max_position_embeddings=14, pad_token_id=0
        )
    sizes = {
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "max_position_embeddings": 14,
    }
    if kind == "roberta":
        return RobertaConfig(**sizes, type_vocab_size=1, pad_token_id=0)
    return BertConfig(**sizes, type_vocab_size=2)


def tiny_base(kind: str = "bert", seed: int = 0) -> PreTrainedModel:
    """A random model with spread-out weights (and biases that are not 0), in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = AutoModel.from_config(tiny_config(kind), attn_implementation="sdpa")
        for parameter in base.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return base.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of a dozen words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def save_tiny(folder: Path, kind: str = "bert", seed: int = 0) -> Path:
    """A checkpoint of `tiny_base` and `tiny_tokenizer`, as transformers writes it."""
    tiny_base(kind, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


class Tiny:
    """What makes tiny models, for tests that need more than a folder."""

    config = staticmethod(tiny_config)
    base = staticmethod(tiny_base)
    tokenizer = staticmethod(tiny_tokenizer)
    save = staticmethod(save_tiny)


@pytest.fixture(scope="session")
def tiny() -> type[Tiny]:
    return Tiny


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny BERT's folder."""
    return save_tiny(tmp_path / "tiny")
