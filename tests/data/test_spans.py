from __future__ import annotations

import pickle

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsebert.data import TASKS, Encoded, encode
from sparsebert.data.spans import DOC_STRIDE, check_answers
from sparsebert.errors import UserError

SQUAD, SQUAD2 = TASKS["squad"], TASKS["squad_v2"]


def rows(*items: tuple[str, str, str | None]) -> Dataset:
    """(question, context, answer or None) to a dataset; the answer is looked for in the context."""
    return Dataset.from_dict(
        {
            "id": [f"id{n}" for n in range(len(items))],
            "question": [question for question, _, _ in items],
            "context": [context for _, context, _ in items],
            "answers": [
                {"text": [answer], "answer_start": [context.index(answer)]} if answer is not None
                else {"text": [], "answer_start": []}
                for _, context, answer in items
            ],
        }
    )  # fmt: skip


def windows(data: Dataset, tokenizer, max_length: int, spec=SQUAD2, training=False) -> Encoded:
    return encode(data, spec, tokenizer, max_length, training=training, label_ids={})


def answer_text(encoded: Encoded, window: int) -> str:
    item = encoded[window]
    chars = encoded.token_chars(window)
    context = encoded.examples[encoded.features[window]].context
    return context[chars[item["start_positions"], 0] : chars[item["end_positions"], 1]]


def test_one_window_by_hand(tokenizer) -> None:
    encoded = windows(rows(("who is red", "The house, is red.", "house, is")), tokenizer, 32)
    item = encoded[0]
    tokens = ["[CLS]", "who", "is", "red", "[SEP]", "the", "house", ",", "is", "red", ".", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(item["input_ids"]) == tokens
    assert item["token_type_ids"] == [0] * 5 + [1] * 7
    assert (item["start_positions"], item["end_positions"]) == (6, 8)
    assert encoded.token_chars(0)[5:11].tolist() == [[0, 3], [4, 9], [9, 10], [11, 13], [14, 17], [17, 18]]
    assert (encoded.token_chars(0)[[0, 1, 2, 3, 4, 11]] == -1).all()
    assert encoded.examples[0].answers == ("house, is",)


def test_windows_cover_the_context_and_overlap(tokenizer) -> None:
    words = [("red", "green", "blue", "house")[n % 4] for n in range(1000)]
    encoded = windows(rows(("who", " ".join(words), "red green")), tokenizer, 384)
    starts, seen = [], set()
    for window in range(len(encoded)):
        chars = encoded.token_chars(window)
        inside = [tuple(pair) for pair in chars.tolist() if pair[0] >= 0]
        shared = seen & set(inside)
        assert len(shared) == (DOC_STRIDE if window else 0)
        seen |= set(inside)
        starts.append(inside[0][0])
        assert encoded.lengths[window] <= 384
    assert len(seen) == 1000
    assert starts == sorted(starts)
    assert encoded.features.tolist() == [0] * len(encoded)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(data=st.data(), max_length=st.integers(24, 80))
def test_every_answer_is_found_again(tokenizer, data, max_length) -> None:
    word = st.sampled_from(["red", "Green", "blue,", "$4", "the", "abc", "house."])
    words = data.draw(st.lists(word, min_size=1, max_size=120))
    gap = data.draw(st.sampled_from([" ", "  ", "\n"]))
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, min(first + 3, len(words) - 1)))
    start = sum(len(w) + len(gap) for w in words[:first])
    answer = gap.join(words[first : last + 1])
    table = Dataset.from_dict(
        {"id": ["a"], "question": ["what is it"], "context": [gap.join(words)],
         "answers": [{"text": [answer], "answer_start": [start]}]}
    )  # fmt: skip
    encoded = windows(table, tokenizer, max_length)
    found = 0
    for window in range(len(encoded)):
        chars = encoded.token_chars(window)
        inside = chars[chars[:, 0] >= 0]
        whole = inside[0, 0] <= start and inside[-1, 1] >= start + len(answer)
        if whole:
            found += 1
            assert answer_text(encoded, window) == answer
        else:
            item = encoded[window]
            assert item["start_positions"] == item["end_positions"] == 0
    # Windows share tokens enough for a short answer, unless there is hardly room for it.
    assert found or max_length < 40


def test_no_answer_points_at_cls(tokenizer) -> None:
    encoded = windows(rows(("who", "The house is red.", None), ("who", "A blue house.", "blue")), tokenizer, 32)
    assert [(encoded[n]["start_positions"], encoded[n]["end_positions"]) for n in range(2)] == [(0, 0), (4, 4)]
    assert encoded.cls_positions.tolist() == [0, 0]


def test_blanks_around_an_answer_do_not_matter(tokenizer) -> None:
    encoded = windows(rows(("who", "  red house", "  red "), ("who", "red", "red")), tokenizer, 32)
    assert answer_text(encoded, 0) == answer_text(encoded, 1) == "red"


def test_rows_stay_in_order_with_questions_of_any_length(tokenizer) -> None:
    long = "red " * 100
    data = rows(("what " * 20, long, "red"), ("what", long, "red"), ("what " * 20, "red", "red"), ("who", long, "red"))
    encoded = windows(data, tokenizer, 48)
    features = encoded.features.tolist()
    assert features == sorted(features)
    assert set(features) == {0, 1, 2, 3}
    what = tokenizer.convert_tokens_to_ids("what")
    for window, row in enumerate(features):
        asked = encoded[window]["input_ids"].count(what)
        assert asked == [20, 1, 20, 0][row]


def test_a_question_is_never_cut(tokenizer) -> None:
    data = rows(("who", "red", "red"), ("what " * 30, "red", "red"))
    assert len(windows(data, tokenizer, 41)) == 2
    with pytest.raises(UserError, match=r"question of row 2 has 30 tokens and leaves 7 of 40 .*41 or more are needed"):
        windows(data, tokenizer, 40)


def test_an_empty_context(tokenizer) -> None:
    encoded = windows(rows(("who", "", None)), tokenizer, 32)
    assert len(encoded) == 1
    assert encoded[0]["start_positions"] == 0


def test_training_keeps_no_characters(tokenizer) -> None:
    data = rows(("who", "The house is red.", "red"))
    trained, scored = windows(data, tokenizer, 32, training=True), windows(data, tokenizer, 32)
    assert trained[0] == scored[0]
    with pytest.raises(UserError, match="encode with training=False"):
        trained.token_chars(0)
    with pytest.raises(UserError, match="no labels"):
        _ = trained.labels
    assert pickle.loads(pickle.dumps(scored))[0] == scored[0]


def test_no_rows(tokenizer) -> None:
    data = rows(("who", "red", "red")).select([])
    assert len(windows(data, tokenizer, 32)) == 0


def test_a_slow_tokenizer_is_refused(tokenizer) -> None:
    slow = pickle.loads(pickle.dumps(tokenizer))
    slow.__class__ = type("Slow", (type(tokenizer),), {"is_fast": False})
    with pytest.raises(UserError, match="needs a fast tokenizer"):
        windows(rows(("who", "red", "red")), slow, 32)


def test_answers_are_checked() -> None:
    good = {"text": ["red"], "answer_start": [4]}
    assert check_answers([good], ["the red"], SQUAD, "f") == [good]
    assert check_answers([{"text": [], "answer_start": []}], ["x"], SQUAD2, "f") == [{"text": [], "answer_start": []}]
    with pytest.raises(UserError, match="f: row 1, column 'answers': the question has no answer"):
        check_answers([{"text": [], "answer_start": []}], ["x"], SQUAD, "f")
    with pytest.raises(UserError, match="row 2, column 'answers': the answer 'red' is not at character 5"):
        check_answers([good, {"text": ["red"], "answer_start": [5]}], ["the red"] * 2, SQUAD, "f")


def test_positions_are_integers(tokenizer) -> None:
    encoded = windows(rows(("who", "The house is red.", "red")), tokenizer, 32)
    assert all(type(encoded[0][name]) is int for name in ("start_positions", "end_positions"))
    assert encoded.targets["start_positions"].dtype == np.int64
