"""What is right, what is best, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsebert.reports.compare import best_of, disagreement, is_faster, mean_error, numbers, verdict
from sparsebert.reports.inputs import cases
from sparsebert.reports.layers import SPARSITIES, crossing, format_of
from sparsebert.reports.timing import Timing
from sparsebert.reports.what_if import suggestion


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_output_is_right_where_it_is_near_the_dense_ones(precision: str) -> None:
    exact = torch.randn(4, 3)
    step = 2e-5 if precision == "fp32" else 0.02
    assert disagreement(exact + step * exact, exact, precision) is None
    for wrong in (exact + 20 * step * exact.abs().max(), exact * float("nan"), exact[:2], -exact):
        assert disagreement(wrong, exact, precision) is not None
    if precision == "bf16":
        assert disagreement(exact * 1.1, exact, precision, own=0.05) is None
        assert "off by 0.1" in str(disagreement(exact * 1.1, exact, precision, own=0.01))


def test_padding_counts_for_nothing() -> None:
    exact, mask = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    other = torch.where(mask[..., None], exact, float("nan"))
    assert disagreement(other, exact, "fp32", mask=mask) is None
    assert mean_error(other, exact, mask) == 0.0
    assert disagreement(other, exact, "fp32") is not None


def test_numbers_of_a_row() -> None:
    (case,) = cases([4], [8], ["real"], [2, 4, 6, 8])
    found = numbers(Timing((0.010, 0.020, 0.030, 0.040, 0.100)), case)
    assert (found["p50_ms"], found["p90_ms"], found["low_ms"], found["high_ms"]) == (30.0, 100.0, 10.0, 100.0)
    assert found["sentences_per_second"] == round(4 / 0.03, 2)
    assert found["tokens_per_second"] == round(case.tokens / 0.03, 1) and found["rounds"] == 5


def row(name: str, kind: str, ms: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {"variant": name, "kind": kind, "status": "ok" if ms else "failed"}
    return found | ({"p50_ms": ms} if ms else {"reason": "wrong"})


DENSE = [row("torch fp32", "dense", 9.0), row("openvino bf16", "against", 3.2)]


def test_the_best_dense_path_is_other_softwares_too() -> None:
    found = best_of([*DENSE, row("unstructured fp32", "subnetwork", 1.6), row("auto bf16", "subnetwork", None)])
    assert (found["best_dense"], found["best_subnetwork"]) == ("openvino bf16", "unstructured fp32")
    assert found["speedup"] == 2.0 and is_faster(found)
    assert verdict(found, [], None).startswith("faster: the subnetwork, unstructured fp32 at 1.6 ms, is 2.00x")
    assert "speedup" not in found["rows"][-1]


def test_says_plainly_that_it_is_not_faster_and_what_would_be() -> None:
    found = best_of([*DENSE, row("unstructured fp32", "subnetwork", 4.0)])
    tried = [
        {"pattern": "block:8x2", "sparsity": share, "variant": "blocks:8x2 bf16", "p50_ms": 3.2 / gain, "speedup": gain}
        for share, gain in ((0.7, 1.01), (0.8, 1.6), (0.9, 3.0))
    ]
    said = verdict(found, tried, suggestion(tried))
    assert said.startswith("not faster: the best dense path is openvino bf16 at 3.2 ms")
    assert "unstructured fp32 at 4 ms" in said and "block:8x2 at 80% would be faster" in said and "2 ms" in said
    assert "no other pattern" in verdict(found, tried[:1], suggestion(tried[:1]))
    assert "--what-if" in verdict(found, [], None)


def test_says_what_cannot_be_said() -> None:
    even = best_of([*DENSE, row("unstructured fp32", "subnetwork", 3.15)])
    assert not is_faster(even) and verdict(even, [], None).startswith("even, within 5%")
    wrong = best_of([*DENSE, row("unstructured fp32", "subnetwork", None)])
    assert wrong["speedup"] is None and "no subnetwork gave right outputs" in verdict(wrong, [], None)
    assert verdict(best_of(DENSE), [], None).startswith("nothing is pruned")
    assert verdict(best_of([row("torch fp32", "dense", None)]), [], None) == "no dense path ran"


def test_a_suggestion_is_the_least_sparsity_then_the_fastest() -> None:
    rows = [
        {"name": 1, "sparsity": 0.9, "speedup": 5.0},
        {"name": 2, "sparsity": 0.8, "speedup": 1.2},
        {"name": 3, "sparsity": 0.8, "speedup": 1.9},
        {"name": 4, "sparsity": 0.5, "speedup": 1.04},
        {"name": 5, "sparsity": 0.5, "reason": "wrong"},
    ]
    assert suggestion(rows) == rows[2]
    assert suggestion(rows[3:]) is None


@given(st.lists(st.floats(0.1, 9), min_size=len(SPARSITIES), max_size=len(SPARSITIES)), st.floats(0.1, 9))
def test_a_break_even_lies_between_a_slower_and_a_faster_sparsity(times: list[float], dense: float) -> None:
    by_share = dict(zip(SPARSITIES, times, strict=True))
    found = crossing(by_share, dense)
    if found is None:
        assert times[-1] > dense
    elif found == 0.0:
        assert all(time <= dense for time in times)
    else:
        slower = max(share for share in SPARSITIES if by_share[share] > dense)
        faster = min(share for share in SPARSITIES if share > slower)
        assert slower - 1e-3 <= found <= faster + 1e-3 and by_share[faster] <= dense


def test_a_break_even_is_interpolated() -> None:
    assert crossing({0.5: 3.0, 0.7: 1.0, 0.9: 0.5}, 2.0) == 0.6
    assert crossing({0.5: 1.0, 0.7: 3.0, 0.9: 1.0}, 2.0) == 0.8, "above the last slower one"


@pytest.mark.parametrize(
    ("pattern", "format"),
    [
        ("unstructured", "unstructured"),
        ("block:8x2", "blocks:8x2"),
        ("2:4", "semi_structured:2:4"),
        ("heads", "compact"),
        ("neurons", "compact"),
    ],
)
def test_every_pattern_has_its_format(pattern: str, format: str) -> None:
    assert format_of(pattern) == format
