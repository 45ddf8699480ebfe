from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from sparsebert.data import TASKS, Encoded, encode, span_metrics, span_predictions
from sparsebert.data.span_metrics import exact_match, normalise, token_f1
from sparsebert.errors import UserError

SQUAD, SQUAD2 = TASKS["squad"], TASKS["squad_v2"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Red, House!", "red house"),
        ("a an the", ""),
        ("theatre another", "theatre another"),
        ("U.S.A.", "usa"),
        ("the-end", "theend"),
        ("\tan\u00a0apple\n", "apple"),
        ("\u201cquoted\u201d", "\u201cquoted\u201d"),
        ("3.5%", "35"),
    ],
)
def test_the_official_normalisation(text, expected) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "f1"),
    [
        ("the red house", "Red House.", 1, 1),
        ("red", "red house", 0, 2 / 3),
        ("red red house", "red house house", 0, 2 / 3),
        ("blue", "red", 0, 0),
        ("", "red", 0, 0),
    ],
)
def test_scores_by_hand(prediction, answer, exact, f1) -> None:
    for unanswerable in (False, True):
        assert token_f1(prediction, answer, unanswerable) == pytest.approx(f1)
    assert exact_match(prediction, answer) == exact


def test_two_empty_sides() -> None:
    # The script of SQuAD 1.1 gives no F1 to an empty overlap, that of 2.0 gives 1.
    assert (exact_match("the", ""), token_f1("the", ""), token_f1("the", "", True)) == (1.0, 0.0, 1.0)


@given(st.lists(st.sampled_from("abcde"), max_size=6), st.lists(st.sampled_from("bcdef"), max_size=6))
def test_f1_is_symmetric_and_bounded(first, second) -> None:
    one, two = " ".join(first), " ".join(second)
    assert token_f1(one, two) == token_f1(two, one)
    assert 0.0 <= token_f1(one, two) <= 1.0
    assert exact_match(one, two) <= token_f1(one, two, True)


def table(*items) -> Dataset:
    """(context, answers) rows."""
    return Dataset.from_dict(
        {
            "id": [f"id{n}" for n in range(len(items))],
            "question": ["who is red"] * len(items),
            "context": [context for context, _ in items],
            "answers": [{"text": list(a), "answer_start": [c.index(x) for x in a]} for c, a in items],
        }
    )


def scored(data: Dataset, tokenizer, max_length=32) -> Encoded:
    return encode(data, SQUAD2, tokenizer, max_length, training=False, label_ids={})


def logits(encoded: Encoded, *peaks: tuple[int, int, float], width=None) -> tuple[np.ndarray, np.ndarray]:
    """Zeros with, per (window, token, height): start for even, end for odd places in the list."""
    shape = (len(encoded), width or max(encoded.lengths))
    start, end = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for place, (window, token, height) in enumerate(peaks):
        (end if place % 2 else start)[window, token] = height
    return start, end


def gold(encoded: Encoded) -> tuple[np.ndarray, np.ndarray]:
    start, end = logits(encoded)
    for window in range(len(encoded)):
        start[window, encoded[window]["start_positions"]] = 5
        end[window, encoded[window]["end_positions"]] = 5
    return start, end


def test_gold_positions_give_full_marks(tokenizer) -> None:
    data = table(
        ("The house is red.", ["house", "The house"]), ("blue is the answer", ["blue"]), ("red " * 60, ["red"])
    )
    encoded = scored(data, tokenizer)
    assert len(encoded) > 3
    assert span_metrics(encoded, *gold(encoded), SQUAD) == {"f1": 1.0, "exact_match": 1.0}


def test_metrics_by_hand(tokenizer) -> None:
    # Tokens: [CLS] who is red [SEP] the house is red . [SEP]
    encoded = scored(table(("The house is red.", ["house is red"]), ("The house is red.", ["is"])), tokenizer)
    start, end = logits(encoded, (0, 6, 5), (0, 6, 5), (1, 7, 5), (1, 7, 5))
    assert span_predictions(encoded, start, end, SQUAD) == ["house", "is"]
    assert span_metrics(encoded, start, end, SQUAD) == {"f1": pytest.approx((0.5 + 1) / 2), "exact_match": 0.5}


def test_only_spans_in_order_in_the_context_and_short_enough(tokenizer) -> None:
    encoded = scored(table(("red " * 40 + "blue", ["red"])), tokenizer, 64)
    assert len(encoded) == 1
    # The highest sums are an end before its start and a start in the question; the best real span has 21 tokens.
    start, end = logits(encoded, (0, 20, 4), (0, 10, 4), (0, 1, 9), (0, 40, 3), (0, 10, 2.5), (0, 12, 1))
    assert span_predictions(encoded, start, end, SQUAD) == [" ".join(["red"] * 21)]
    start, end = logits(encoded, (0, 10, 9), (0, 40, 9))
    assert len(span_predictions(encoded, start, end, SQUAD)[0].split()) <= 30
    start, end = logits(encoded, (0, 10, 9), (0, 39, 9))
    assert len(span_predictions(encoded, start, end, SQUAD)[0].split()) == 30


def test_the_best_window_wins(tokenizer) -> None:
    encoded = scored(table(("red " * 30 + "blue house", ["blue"])), tokenizer, 24)
    last = len(encoded) - 1
    blue = encoded[last]["input_ids"].index(tokenizer.convert_tokens_to_ids("blue"))
    start, end = logits(encoded, (0, 6, 3), (0, 6, 3), (last, blue, 4), (last, blue, 4))
    assert span_predictions(encoded, start, end, SQUAD) == ["blue"]


def test_no_answer_wins_if_its_lowest_score_is_higher(tokenizer) -> None:
    data = table(("The house is red.", ["house"]), ("The house is red.", []))
    encoded = scored(data, tokenizer)
    for height, expected in ((3.0, ["house", "house"]), (4.0, ["house", "house"]), (4.5, ["", ""])):
        peaks = [(row, token, value) for row in (0, 1) for token, value in ((6, 4), (6, 4), (0, height), (0, height))]
        start, end = logits(encoded, *peaks)
        assert span_predictions(encoded, start, end, SQUAD2) == expected
        assert span_predictions(encoded, start, end, SQUAD) == ["house", "house"]
    scores = span_metrics(encoded, start, end, SQUAD2)
    assert scores == {
        "f1": 0.5, "exact_match": 0.5, "has_answer_f1": 0.0, "has_answer_exact_match": 0.0, "no_answer_accuracy": 1.0
    }  # fmt: skip
    assert tuple(scores) == SQUAD2.metrics


def test_no_answer_must_win_in_every_window(tokenizer) -> None:
    encoded = scored(table(("red " * 30, [])), tokenizer, 24)
    start, end = logits(encoded, *[(w, 0, 5) for w in range(len(encoded)) for _ in range(2)], (1, 6, 2), (1, 6, 2))
    assert span_predictions(encoded, start, end, SQUAD2) == [""]
    start[1, 0] = end[1, 0] = 1
    assert span_predictions(encoded, start, end, SQUAD2) == ["red"]


def test_all_with_or_without_answers(tokenizer) -> None:
    for answers in ([], ["red"]):
        encoded = scored(table(("red", answers)), tokenizer)
        scores = span_metrics(encoded, *gold(encoded), SQUAD2)
        assert all(np.isfinite(list(scores.values())))
        assert scores["f1"] == 1.0


def test_padding_columns_are_not_read(tokenizer) -> None:
    encoded = scored(table(("The house is red.", ["house"]), ("red", ["red"])), tokenizer)
    start, end = (np.pad(one, ((0, 0), (0, 5)), constant_values=np.nan) for one in gold(encoded))
    start[1, encoded.lengths[1] :] = end[1, encoded.lengths[1] :] = -100
    assert span_metrics(encoded, start, end, SQUAD)["exact_match"] == 1.0


def test_rows_of_different_lengths(tokenizer) -> None:
    encoded = scored(table(("The house is red.", ["house"]), ("red", ["red"])), tokenizer)
    start, end = ([row[:length] for row, length in zip(one, encoded.lengths, strict=True)] for one in gold(encoded))
    assert span_metrics(encoded, start, end, SQUAD)["exact_match"] == 1.0
    objects = [np.array(rows, dtype=object) for rows in (start, end)]
    assert span_metrics(encoded, *objects, SQUAD)["exact_match"] == 1.0


def test_a_context_without_tokens(tokenizer) -> None:
    encoded = scored(table(("", [])), tokenizer)
    assert span_predictions(encoded, *logits(encoded), SQUAD2) == [""]
    assert span_metrics(encoded, *logits(encoded), SQUAD2)["exact_match"] == 1.0


def test_wrong_arrays(tokenizer) -> None:
    encoded = scored(table(("The house is red.", ["house"])), tokenizer)
    start, end = gold(encoded)
    with pytest.raises(UserError, match=r"start_logits: expected 11 or more values for window 0, got shape \(10,\)"):
        span_metrics(encoded, start[:, :-1], end, SQUAD)
    with pytest.raises(UserError, match=r"end_logits: expected one row for each of 1 windows, got 2"):
        span_metrics(encoded, start, np.zeros((2, 11)), SQUAD)
    with pytest.raises(UserError, match=r"start_logits: expected 11 or more values for window 0, got shape \(1, 11\)"):
        span_metrics(encoded, start[None], end, SQUAD)
    start[0, 3] = np.nan
    with pytest.raises(UserError, match="start_logits: 1 of 1 windows are not finite"):
        span_metrics(encoded, start, end, SQUAD)
    labels = Dataset.from_dict({"sentence": ["a"], "label": [0]})
    other = encode(labels, TASKS["sst2"], tokenizer, 8, training=False, label_ids={"negative": 0, "positive": 1})
    with pytest.raises(UserError, match="expected the windows of a span task"):
        span_metrics(other, start, end, SQUAD)
    trained = encode(table(("red", ["red"])), SQUAD, tokenizer, 32, training=True, label_ids={})
    with pytest.raises(UserError, match="training=False"):
        span_metrics(trained, *logits(trained), SQUAD)
