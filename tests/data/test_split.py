from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsebert.data import TASKS, hold_out
from sparsebert.data.split import held_out_rows, sample
from sparsebert.errors import UserError

SST2 = TASKS["sst2"]


def dataset(labels, texts=None) -> Dataset:
    return Dataset.from_dict(
        {"sentence": texts or [f"text {row}" for row in range(len(labels))], "label": list(labels)}
    )


def test_stratified_and_complete() -> None:
    data = dataset([0] * 300 + [1] * 100)
    train, held = hold_out(data, SST2)
    assert Counter(held["label"][:]) == {0: 30, 1: 10}
    assert sorted(train["sentence"][:] + held["sentence"][:]) == sorted(data["sentence"][:])
    rows = [int(text.split()[1]) for text in train["sentence"][:]]
    assert rows == sorted(rows)


def test_the_same_for_the_same_texts_in_any_order() -> None:
    data = dataset([row % 2 for row in range(200)])
    _, held = hold_out(data, SST2, 0.2, seed=3)
    _, again = hold_out(data, SST2, 0.2, seed=3)
    _, shuffled = hold_out(data.shuffle(seed=1), SST2, 0.2, seed=3)
    _, other = hold_out(data, SST2, 0.2, seed=4)
    assert held["sentence"][:] == again["sentence"][:]
    assert sorted(held["sentence"][:]) == sorted(shuffled["sentence"][:])
    assert held["sentence"][:] != other["sentence"][:]


def test_the_choice_does_not_change_between_releases() -> None:
    _, held = hold_out(dataset([row % 2 for row in range(20)]), SST2)
    assert held["sentence"][:] == ["text 4", "text 19"]


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.sampled_from([f"t{n}" for n in range(12)]), min_size=2, max_size=60),
    seed=st.integers(0, 3),
    fraction=st.sampled_from([0.1, 0.3, 0.5, 0.9]),
    data=st.data(),
)
def test_equal_texts_stay_on_one_side(texts, seed, fraction, data) -> None:
    labels = data.draw(st.lists(st.integers(0, 1), min_size=len(texts), max_size=len(texts)))
    try:
        train, held = hold_out(dataset(labels, texts), SST2, fraction, seed)
    except UserError as error:
        assert "cannot hold out" in str(error)
        return
    assert not set(train["sentence"][:]) & set(held["sentence"][:])
    assert len(train) + len(held) == len(texts)
    assert len(train) and len(held)


def test_pairs_and_contexts() -> None:
    pairs = Dataset.from_dict(
        {"sentence1": ["a"] * 40, "sentence2": [f"b{n % 20}" for n in range(40)], "label": [n % 2 for n in range(40)]}
    )
    train, held = hold_out(pairs, TASKS["rte"], 0.25)
    assert not set(train["sentence2"][:]) & set(held["sentence2"][:])
    numbers = pairs.remove_columns("label").add_column("label", [float(n) for n in range(40)])
    assert len(hold_out(numbers, TASKS["stsb"], 0.25)[1]) == 10
    answers = [{"text": ["c"], "answer_start": [0]}] * 40
    squad = Dataset.from_dict(
        {"context": [f"c{n // 4}" for n in range(40)], "question": [f"q{n}" for n in range(40)], "answers": answers}
    )
    train, held = hold_out(squad, TASKS["squad"], 0.2)
    assert len(held) == 8
    assert not set(train["context"][:]) & set(held["context"][:])


def test_rare_classes_keep_a_training_row() -> None:
    train, held = hold_out(dataset([0] * 30 + [1] + [2] * 2), SST2, 0.5)
    assert Counter(held["label"][:]) == {0: 15, 2: 1}
    assert set(train["label"][:]) == {0, 1, 2}


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_wrong_fractions(fraction) -> None:
    with pytest.raises(UserError, match="fraction: expected a number between 0 and 1"):
        hold_out(dataset([0, 1, 0, 1]), SST2, fraction)


@pytest.mark.parametrize("data", [dataset([0, 1]), dataset([0, 1, 0, 1], ["a"] * 4), dataset([0])])
def test_too_few_rows(data) -> None:
    with pytest.raises(UserError, match=r"cannot hold out 10% of \d rows with \d distinct inputs"):
        hold_out(data, SST2)


def test_smallest_hashes_are_held_out_and_large_groups_passed_over() -> None:
    keys = [f"k{n}" for n in range(50)]
    order = sorted(range(50), key=lambda row: hashlib.sha256(keys[row].encode()).digest())
    assert held_out_rows(keys, [0] * 50, {0: 7}) == sorted(order[:7])
    first = keys[order[0]]
    tripled = [*keys, first, first]
    held = held_out_rows(tripled, [0] * 52, {0: 2})
    assert held == sorted(order[1:3])


def test_samples_are_prefixes_of_one_order() -> None:
    data = dataset([0] * 50)
    small, large = sample(data, 5, 1, "x"), sample(data, 20, 1, "x")
    assert small["sentence"][:] == large["sentence"][:5]
    assert len(set(large["sentence"][:])) == 20
    assert sample(data, 5, 2, "x")["sentence"][:] != small["sentence"][:]
    assert sample(data, None, 1, "x") is data
    assert sample(data, 50, 1, "x")["sentence"][:] == data["sentence"][:]
    assert sample(data, 10**9, 1, "x")["sentence"][:] == data["sentence"][:]
    with pytest.raises(UserError, match="max_train_samples: expected at least 1, got 0"):
        sample(data, 0, 1, "max_train_samples")
