"""Timing in turns: who is called when, how often, and what is made of the seconds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsebert.reports.inputs import LENGTHS, SST2_LENGTHS, cases
from sparsebert.reports.timing import STOPWATCHES, Timing, interleave


def scripted(numbers: list[float]) -> Callable[[Callable[[], Any]], float]:
    """A stopwatch that reads off given seconds, and does run the call."""

    def watch(call: Callable[[], Any]) -> float:
        call()
        return numbers.pop(0)

    return watch


def test_candidates_take_turns_and_each_round_begins_with_another() -> None:
    calls: list[str] = []
    timed: list[str] = []

    def watch(call: Callable[[], Any]) -> float:
        call()
        timed.append(calls[-1])
        return float(len(timed))

    candidates = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    found = interleave(candidates, 4, watch, settle=0.0)
    assert "".join(timed) == "abc" + "bca" + "cab" + "abc"
    # Twice to warm up, and once untimed before each timed call.
    assert all(calls.count(name) == 2 + 2 * 4 for name in "abc")
    assert found["b"].seconds == (2.0, 4.0, 9.0, 11.0)
    assert (found["b"].median, found["b"].low, found["b"].high) == (6.5, 2.0, 11.0)


def test_a_spent_budget_ends_the_rounds_but_not_before_the_third() -> None:
    assert len(interleave({"a": lambda: None}, 50, scripted([1.0] * 50), budget=0.0)["a"].seconds) == 3
    assert len(interleave({"a": lambda: None}, 2, scripted([1.0] * 50), budget=0.0)["a"].seconds) == 2
    assert interleave({}, 3) == {}


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=30), st.floats(0, 1))
def test_a_quantile_is_a_time_that_so_many_rounds_did_not_exceed(seconds: list[float], share: float) -> None:
    found = Timing(tuple(seconds)).quantile(share)
    assert found in seconds
    assert sum(second <= found for second in seconds) >= share * len(seconds) - 1e-9
    assert sum(second < found for second in seconds) < max(1, math.ceil(share * len(seconds)))


@pytest.mark.parametrize("name", ["wall", "cpu"])
def test_stopwatches_run_the_call_once(name: str) -> None:
    calls: list[int] = []
    assert STOPWATCHES[name](lambda: calls.append(1)) >= 0
    assert calls == [1]


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.lists(st.integers(1, 70), min_size=1, max_size=3),
    st.lists(st.integers(1, 90), min_size=1, max_size=40),
)
def test_batches_have_the_sizes_that_are_asked_for(batches: list[int], longest: list[int], real: list[int]) -> None:
    found = cases(batches, longest, LENGTHS, real)
    assert {case.batch for case in found} == set(batches)
    assert {case.width for case in found if case.kind == "full"} <= set(longest)
    assert len({(case.lengths, case.width) for case in found}) == len(found)
    for case in found:
        assert max(case.lengths) == case.width <= max(longest) and min(case.lengths) >= 1
        if case.kind == "real":
            assert case.width <= max(real) and list(case.lengths) == sorted(case.lengths)


def test_real_lengths_are_the_quantiles_of_the_distribution() -> None:
    (one,) = cases([1], [128], ["real"], SST2_LENGTHS)
    (many,) = cases([400], [128], ["real"], SST2_LENGTHS)
    (cut,) = cases([4], [20], ["real"], SST2_LENGTHS)
    assert one.lengths == (25,) and max(cut.lengths) == 20
    assert abs(many.tokens / 400 - 25.2) < 1, "the mean of SST-2's sentences"


@given(st.integers(0, 30), st.integers(0, 1000))
def test_tokens_are_never_padding_and_padding_is_nothing_else(padding: int, seed: int) -> None:
    (case,) = cases([3], [12], ["real"], [2, 6, 12])
    inputs = case.inputs(31, padding, seed, torch.device("cpu"))
    assert inputs["attention_mask"].sum(1).tolist() == list(case.lengths)
    assert torch.equal(inputs["input_ids"] == padding, inputs["attention_mask"] == 0)
    assert int(inputs["input_ids"].min()) >= 0 and int(inputs["input_ids"].max()) <= 30
    assert torch.equal(inputs["input_ids"], case.inputs(31, padding, seed, torch.device("cpu"))["input_ids"])


@pytest.mark.parametrize(
    ("sizes", "said"),
    [(([0], [8], ["full"]), "batch-sizes"), (([1], [-3], ["full"]), "seq-lens"), (([1], [8], ["ful"]), "'full'")],
)
def test_sizes_that_cannot_be_are_refused(sizes: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cases(*sizes, SST2_LENGTHS)
