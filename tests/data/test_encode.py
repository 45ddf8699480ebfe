from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForSequenceClassification

from sparsebert.data import TASKS, Collator, encode, label_ids
from sparsebert.errors import UserError

SST2, RTE, STSB = TASKS["sst2"], TASKS["rte"], TASKS["stsb"]


def single(texts, labels=None) -> Dataset:
    return Dataset.from_dict({"sentence": list(texts), "label": list(labels or [0] * len(texts))})


def pairs(first, second, labels) -> Dataset:
    return Dataset.from_dict({"sentence1": list(first), "sentence2": list(second), "label": list(labels)})


def test_single_texts_equal_the_tokenizer(tokenizer) -> None:
    texts = ["the red house", "who is blue?", "", "what " * 50]
    encoded = encode(single(texts, [1, 0, 1, 0]), SST2, tokenizer, 16, training=True, label_ids=label_ids(SST2, None))
    assert len(encoded) == 4
    for number, text in enumerate(texts):
        expected = tokenizer(text, truncation=True, max_length=16)
        item = encoded[number]
        assert {name: item[name] for name in expected} == dict(expected)
        assert item["labels"] == [1, 0, 1, 0][number]
        assert type(item["labels"]) is int
        assert encoded.lengths[number] == len(item["input_ids"])
    assert encoded.lengths == [5, 6, 2, 16]
    assert encoded[-1] == encoded[3]
    with pytest.raises(IndexError):
        encoded[4]


def test_pairs_are_cut_from_the_longer_side(tokenizer) -> None:
    data = pairs(["red " * 20, "red red"], ["blue blue", "green " * 20], [0, 1])
    encoded = encode(data, RTE, tokenizer, 12, training=True, label_ids=label_ids(RTE, None))
    red, green, blue = tokenizer.convert_tokens_to_ids(["red", "green", "blue"])
    assert encoded[0]["input_ids"] == [2, *[red] * 7, 3, blue, blue, 3]
    assert encoded[1]["input_ids"] == [2, red, red, 3, *[green] * 7, 3]
    assert encoded[0]["token_type_ids"] == [0] * 9 + [1] * 3


def test_labels_go_through_the_models_numbers(tokenizer) -> None:
    data = single(["red", "blue", "green"], [1, 0, 1])
    encoded = encode(data, SST2, tokenizer, 8, training=False, label_ids={"positive": 0, "negative": 5})
    assert [encoded[row]["labels"] for row in range(3)] == [0, 5, 0]
    assert encoded.labels.dtype == np.int64
    assert encoded.label_ids == {"positive": 0, "negative": 5}
    with pytest.raises(UserError, match="label_ids: no number for positive"):
        encode(data, SST2, tokenizer, 8, training=False, label_ids={"negative": 0})


def test_scores_are_floats(tokenizer) -> None:
    encoded = encode(pairs(["a"], ["b"], [2.5]), STSB, tokenizer, 8, training=True, label_ids={})
    assert encoded[0]["labels"] == 2.5
    assert encoded.labels.dtype == np.float32


@pytest.mark.parametrize("rows", [2001, 0])
def test_more_than_one_batch_of_rows_and_none(tokenizer, rows) -> None:
    data = single([f"text {row}" for row in range(2001)]).select(range(rows))
    encoded = encode(data, SST2, tokenizer, 16, training=True, label_ids=label_ids(SST2, None))
    assert len(encoded) == len(encoded.labels) == rows
    if rows:
        assert encoded[2000]["input_ids"] == tokenizer("text 2000")["input_ids"]


@pytest.mark.parametrize(("spec", "least"), [(SST2, 3), (RTE, 5)])
def test_max_length_is_checked(tokenizer, spec, least) -> None:
    data = single(["a"]) if spec is SST2 else pairs(["a"], ["b"], [0])
    ids = label_ids(spec, None)
    assert encode(data, spec, tokenizer, least, training=True, label_ids=ids).lengths == [least]
    with pytest.raises(UserError, match=f"max_length: expected at least {least}"):
        encode(data, spec, tokenizer, least - 1, training=True, label_ids=ids)
    with pytest.raises(UserError, match="the model takes at most 512 tokens, got 513"):
        encode(data, spec, tokenizer, 513, training=True, label_ids=ids)


def test_a_tokenizer_without_type_ids(tokenizer) -> None:
    plain = pickle.loads(pickle.dumps(tokenizer))
    plain.model_input_names = ["input_ids", "attention_mask"]
    item = encode(single(["red"]), SST2, plain, 8, training=True, label_ids=label_ids(SST2, None))[0]
    assert set(item) == {"input_ids", "attention_mask", "labels"}


def test_encoded_data_go_to_workers(tokenizer) -> None:
    encoded = encode(single(["red house", "blue"]), SST2, tokenizer, 8, training=True, label_ids=label_ids(SST2, None))
    copy = pickle.loads(pickle.dumps(encoded))
    assert [copy[row] for row in range(2)] == [encoded[row] for row in range(2)]
    loader = torch.utils.data.DataLoader(encoded, 2, collate_fn=Collator(tokenizer))
    assert next(iter(loader))["input_ids"].shape == (2, 4)


def test_collated_batches(tokenizer) -> None:
    collator = pickle.loads(pickle.dumps(Collator(tokenizer)))
    batch = collator([
        {"input_ids": [2, 9, 3], "attention_mask": [1, 1, 1], "token_type_ids": [0, 0, 1], "labels": 1},
        {"input_ids": [2, 3], "attention_mask": [1, 1], "token_type_ids": [0, 1], "labels": 0},
    ])  # fmt: skip
    assert {name: (value.tolist(), value.dtype) for name, value in batch.items()} == {
        "input_ids": ([[2, 9, 3], [2, 3, 0]], torch.int64),
        "attention_mask": ([[1, 1, 1], [1, 1, 0]], torch.int64),
        "token_type_ids": ([[0, 0, 1], [0, 1, 0]], torch.int64),
        "labels": ([1, 0], torch.int64),
    }


def test_collated_scores_and_positions(tokenizer) -> None:
    item = {"input_ids": [2, 3], "attention_mask": [1, 1]}
    assert Collator(tokenizer)([item | {"labels": 2.5}])["labels"].dtype == torch.float32
    batch = Collator(tokenizer)([item | {"start_positions": 1, "end_positions": 2}])
    assert (batch["start_positions"].dtype, batch["end_positions"].tolist()) == (torch.int64, [2])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=6), multiple=st.sampled_from([None, 1, 8, 16]))
def test_padding_is_the_least_there_can_be(tokenizer, lengths, multiple) -> None:
    items = [{"input_ids": [7] * n, "attention_mask": [1] * n, "labels": 0} for n in lengths]
    batch = Collator(tokenizer, multiple)(items)
    width = batch["input_ids"].shape[1]
    assert width % (multiple or 1) == 0
    assert max(lengths) <= width < max(lengths) + (multiple or 1)
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert ((batch["input_ids"] == 7) == batch["attention_mask"].bool()).all()


def test_wrong_collators(tokenizer) -> None:
    with pytest.raises(UserError, match="pad_to_multiple_of: expected at least 1, got 0"):
        Collator(tokenizer, 0)
    with pytest.raises(UserError, match="features: expected at least one item"):
        Collator(tokenizer)([])
    bare = pickle.loads(pickle.dumps(tokenizer))
    bare.pad_token = None
    with pytest.raises(UserError, match="no padding token"):
        Collator(bare)


def test_a_model_takes_the_batch(tokenizer) -> None:
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    encoded = encode(
        single(["red", "blue house"], [0, 1]), SST2, tokenizer, 8, training=True, label_ids=label_ids(SST2, None)
    )
    batch = Collator(tokenizer)([encoded[0], encoded[1]])
    output = BertForSequenceClassification(config)(**batch)
    assert output.logits.shape == (2, 2)
    assert torch.isfinite(output.loss)
