"""Fewer rows, unbalanced classes and wrong labels: drawn with a seed of their own, counted and named."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsebert.data import TASKS, Variant, load_task
from sparsebert.data.split import sample
from sparsebert.data.tasks import custom_task
from sparsebert.data.variants import apply_variant
from sparsebert.errors import UserError

SST2 = TASKS["sst2"]
NAMES = ("a", "b", "c", "d")


def rows(labels, names=SST2.label_names) -> Dataset:
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"sentence": [f"text {n}" for n in range(len(labels))], "label": labels}, features)


def spec_of(names):
    return custom_task("custom", "classification", ["sentence"], "label", names)


def changed(data, variant, spec=SST2):
    """The rows as (number in the data, label), and what was done."""
    train, _, done = apply_variant(data, spec, variant)
    return [(int(row["sentence"].split()[1]), row["label"]) for row in train], done


def test_nothing_asked_nothing_done() -> None:
    data = rows([0, 1, 0])
    train, note, done = apply_variant(data, SST2, Variant(seed=5))
    assert train is data and (note, done) == ("", {})
    assert not Variant(seed=5) and Variant(label_noise=0.1) and Variant(imbalance=1) and Variant(few_samples=1)


def test_few_samples_are_the_sample_of_the_seed() -> None:
    data = rows([n % 2 for n in range(100)])
    found, done = changed(data, Variant(few_samples=30, seed=4))
    assert [f"text {number}" for number, _ in found] == sample(data, 30, 4, "x")["sentence"][:]
    assert len({number for number, _ in found}) == 30
    assert all(label == number % 2 for number, label in found)
    assert done == {
        "seed": 4, "few_samples": {"of": 100, "rows": 30}, "rows": 30,
        "classes": {"negative": 30 - sum(label for _, label in found), "positive": sum(label for _, label in found)},
    }  # fmt: skip
    assert changed(data, Variant(few_samples=10, seed=4))[0] == found[:10]
    assert changed(data, Variant(few_samples=30, seed=5))[0] != found
    assert changed(data, Variant(few_samples=100))[1]["rows"] == 100


def test_the_draws_do_not_change_between_releases() -> None:
    data = rows([n % 2 for n in range(12)])
    assert [n for n, _ in changed(data, Variant(few_samples=5))[0]] == [6, 11, 4, 10, 2]
    assert [n for n, _ in changed(data, Variant(imbalance=3))[0]] == [0, 2, 3, 4, 5, 6, 8, 10]
    assert [n for n, label in changed(data, Variant(label_noise=0.4))[0] if label != n % 2] == [0, 2, 5, 6]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 3), min_size=8, max_size=200).filter(lambda labels: len(set(labels)) > 1),
    st.floats(1.0, 20.0),
    st.integers(0, 2**32 - 1),
)
def test_sizes_fall_geometrically(labels, ratio, seed) -> None:
    data, sizes = rows(labels, NAMES), Counter(labels)
    order = [number for number, _ in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))]
    largest, places = sizes[order[0]], len(order) - 1
    expected = {n: min(sizes[n], round(largest / ratio ** (place / places))) for place, n in enumerate(order)}
    if min(expected.values()) == 0:
        with pytest.raises(UserError, match=r"imbalance .*: would leave no training row of"):
            changed(data, Variant(imbalance=ratio, seed=seed), spec_of(NAMES))
        return
    found, done = changed(data, Variant(imbalance=ratio, seed=seed), spec_of(NAMES))
    assert Counter(label for _, label in found) == expected
    assert done["classes"] == {name: expected.get(n, 0) for n, name in enumerate(NAMES)}
    numbers = [number for number, _ in found]
    assert numbers == sorted(set(numbers))
    assert all(labels[number] == label for number, label in found)


def test_ten_to_one() -> None:
    labels = [0] * 500 + [1] * 300
    found, done = changed(rows(labels), Variant(imbalance=10))
    assert done == {
        "seed": 0, "imbalance": {"ratio": 10, "rows": 550}, "rows": 550, "classes": {"negative": 500, "positive": 50}
    }  # fmt: skip
    assert [number for number, _ in found[:500]] == list(range(500))
    assert {n for n, _ in changed(rows(labels), Variant(imbalance=20))[0]} < {n for n, _ in found}
    rare, _ = changed(rows([0] * 500 + [1] * 7), Variant(imbalance=10))
    assert len(rare) == 507


@settings(deadline=None, max_examples=40)
@given(st.floats(0.001, 0.999), st.integers(0, 2**32 - 1), st.integers(2, 4))
def test_flips_go_to_another_class_and_stay_when_noise_grows(probability, seed, classes) -> None:
    names = NAMES[:classes]
    labels = [n % classes for n in range(400)]
    data, spec = rows(labels, names), spec_of(names)
    found, done = changed(data, Variant(label_noise=probability, seed=seed), spec)
    assert [number for number, _ in found] == list(range(400))
    assert all(0 <= label < classes for _, label in found)
    flips = {number: label for number, label in found if label != labels[number]}
    assert done["label_noise"] == {"probability": probability, "flipped": len(flips)}
    assert abs(len(flips) - 400 * probability) < 5.5 * math.sqrt(400 * probability * (1 - probability)) + 1
    more, _ = changed(data, Variant(label_noise=(1 + probability) / 2, seed=seed), spec)
    assert all(more[number] == (number, label) for number, label in flips.items())


def test_flips_are_uniform_over_the_other_classes() -> None:
    labels = [n % 4 for n in range(8000)]
    found, _ = changed(rows(labels, NAMES), Variant(label_noise=0.5), spec_of(NAMES))
    pairs = Counter((labels[number], label) for number, label in found)
    for true in range(4):
        assert abs(pairs[true, true] - 1000) < 120
        assert all(abs(pairs[true, other] - 1000 / 3) < 85 for other in range(4) if other != true)


def test_the_order_imbalance_then_samples_then_noise() -> None:
    data = rows([0] * 300 + [1] * 300)
    both, done = changed(data, Variant(few_samples=100, label_noise=0.3, imbalance=5, seed=2))
    imbalanced = apply_variant(data, SST2, Variant(imbalance=5, seed=2))[0]
    fewer = apply_variant(imbalanced, SST2, Variant(few_samples=100, seed=2))[0]
    assert both == changed(fewer, Variant(label_noise=0.3, seed=2))[0]
    assert list(done) == ["seed", "imbalance", "few_samples", "label_noise", "rows", "classes"]
    assert (done["imbalance"]["rows"], done["few_samples"], done["rows"]) == (360, {"of": 360, "rows": 100}, 100)
    assert sum(done["classes"].values()) == 100
    assert json.loads(json.dumps(done)) == done


def test_in_a_task(tmp_path, write, sst2) -> None:
    """Only train changes; the fingerprint and the note say what was done; a cap comes last and takes of the result."""
    write(tmp_path / "train.csv", sst2(200))
    write(tmp_path / "validation.csv", sst2(20))
    variant = Variant(few_samples=100, label_noise=0.3, imbalance=2, seed=3)
    plain, data, again = load_task("sst2", tmp_path), *(load_task("sst2", tmp_path, variant=variant) for _ in range(2))
    assert data.train[:] == again.train[:] and data.fingerprint == again.fingerprint
    assert data.train.features == plain.train.features
    assert data.validation[:] == plain.validation[:]
    done = data.fingerprint["variant"]
    assert data.fingerprint == plain.fingerprint | {"variant": done, "rows": {"train": 100, "validation": 20}}
    true = dict(zip(plain.train["sentence"][:], plain.train["label"][:], strict=True))
    assert sum(true[row["sentence"]] != row["label"] for row in data.train) == done["label_noise"]["flipped"]
    assert data.note == plain.note + (
        "; training rows changed with variant seed 3: imbalance 2 left 150 of 200, then 100 of 150 were drawn at "
        f"random, then {done['label_noise']['flipped']} of 100 labels were flipped (label noise 0.3)"
    )
    capped = load_task("sst2", tmp_path, variant=variant, max_train_samples=8)
    assert capped.fingerprint["variant"] == done and capped.fingerprint["rows"]["train"] == 8
    labels = dict(zip(data.train["sentence"][:], data.train["label"][:], strict=True))
    assert all(labels[row["sentence"]] == row["label"] for row in capped.train)


def test_nothing_asked_leaves_the_fingerprint(tmp_path, write, sst2) -> None:
    write(tmp_path / "train.csv", sst2(40))
    plain, data = load_task("sst2", tmp_path), load_task("sst2", tmp_path, variant=Variant(seed=9))
    assert data.fingerprint == plain.fingerprint and data.note == plain.note
    assert data.train[:] == plain.train[:]


def test_rows_held_out_as_validation_keep_their_labels(tmp_path, write, sst2) -> None:
    write(tmp_path / "train.csv", sst2(100))
    plain, data = load_task("sst2", tmp_path), load_task("sst2", tmp_path, variant=Variant(label_noise=0.9))
    assert data.validation[:] == plain.validation[:]
    assert data.train["label"][:] != plain.train["label"][:]


def test_numbers_and_spans(tmp_path, write) -> None:
    columns = {
        "sentence1": [f"a{n}" for n in range(20)],
        "sentence2": ["b"] * 20,
        "label": [n % 9 / 2 for n in range(20)],
    }
    write(tmp_path / "stsb" / "train.jsonl", columns)
    answers = [{"text": ["c"], "answer_start": [0]}] * 20
    squad = {"id": list(map(str, range(20))), "context": [f"c{n}" for n in range(20)], "question": ["q"] * 20}
    write(tmp_path / "squad" / "train.jsonl", squad | {"answers": answers})
    for task, kind in (("stsb", "regression"), ("squad", "span")):
        data = load_task(task, tmp_path, variant=Variant(few_samples=5))
        assert len(data.train) == 5
        assert data.fingerprint["variant"] == {"seed": 0, "few_samples": {"of": 18, "rows": 5}, "rows": 5}
        for name, variant in (("label_noise", Variant(label_noise=0.3)), ("imbalance", Variant(imbalance=2))):
            with pytest.raises(UserError, match=f"^{name}: task {task} is {kind} and has no classes"):
                load_task(task, tmp_path, variant=variant)


def test_no_train_split_no_variant(tmp_path, write, sst2) -> None:
    write(tmp_path / "validation.csv", sst2(6))
    data = load_task("sst2", tmp_path, require_train=False, variant=Variant(few_samples=100))
    assert len(data.train) == 0 and "variant" not in data.fingerprint


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"few_samples": 0}, "few_samples: expected at least 1, got 0"),
        ({"label_noise": 1.0}, "label_noise: expected a probability of at least 0 and below 1, got 1"),
        ({"label_noise": -0.1}, "label_noise: .* got -0.1"),
        ({"label_noise": math.nan}, "label_noise: .* got nan"),
        ({"imbalance": 0.5}, "imbalance: expected at least 1 .* got 0.5"),
        ({"imbalance": math.inf}, "imbalance: .* got inf"),
        ({"imbalance": math.nan}, "imbalance: .* got nan"),
        ({"seed": -1}, "variant_seed: expected 0 to 4294967295, got -1"),
        ({"seed": 2**32}, "variant_seed: expected 0 to"),
    ],
)
def test_numbers_that_no_data_fit(wrong, message) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        Variant(**wrong)


@pytest.mark.parametrize(
    ("labels", "variant", "message"),
    [
        ([0, 1] * 5, Variant(few_samples=11), "few_samples: there are 10 training rows, got 11"),
        (
            [0] * 60 + [1],
            Variant(few_samples=2),
            r"few_samples 2: would leave no training row of positive \(there are 1",
        ),
        (
            [0, 1] * 5,
            Variant(imbalance=30),
            r"imbalance 30: would leave no training row of positive \(there are 5 of 10",
        ),
        ([0, 0, 0], Variant(imbalance=2), "imbalance: the 3 training rows are of one class"),
        (
            [0, 1],
            Variant(label_noise=0.4),
            r"label_noise 0.4: would leave no training row of negative \(there are 1 of 2",
        ),
    ],
)
def test_what_the_data_do_not_give(labels, variant, message) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        changed(rows(labels), variant)
