"""Whether a variant's output is right, what its times come to, and what is said of a batch in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sparsebert.nn.choose import MARGIN
from sparsebert.reports.inputs import Case
from sparsebert.reports.timing import Timing

__all__ = ["best_of", "disagreement", "is_faster", "mean_error", "numbers", "verdict"]

FP32_ERROR = 1e-4
"""An output in fp32 is right where no number is further from the dense masked model's: of its largest, or of 1."""

BF16_ERROR = 0.05
"""In bf16: the mean error over the mean output, or three times torch's own in bf16 where that is more."""


def disagreement(
    output: Tensor, exact: Tensor, precision: str, *, mask: Tensor | None = None, own: float = 0.0
) -> str | None:
    """Why an output is wrong, or None.

    Args:
        output: of a variant.
        exact: of the dense masked model by torch in fp32.
        precision: "fp32" or "bf16".
        mask: bool, where the outputs count; None: everywhere.
        own: `mean_error` of torch's own dense model in bf16.
    """
    if output.shape != exact.shape:
        return f"its output is {list(output.shape)}, the dense masked model's {list(exact.shape)}"
    if precision != "fp32":
        error, bound = mean_error(output, exact, mask), max(BF16_ERROR, 3 * own)
        return (
            None if error <= bound else f"its outputs are off by {error:.2g} on average, at most {bound:.2g} is right"
        )
    output, exact = _counting(output, mask), _counting(exact, mask)
    error = float((output - exact).abs().max() / exact.abs().max().clamp(min=1.0))
    # Written so that NaN is wrong too.
    return None if error <= FP32_ERROR else f"its outputs are off by {error:.2g}, at most {FP32_ERROR:g} is right"


def mean_error(output: Tensor, exact: Tensor, mask: Tensor | None = None) -> float:
    """Mean absolute difference over the mean absolute output."""
    output, exact = _counting(output, mask), _counting(exact, mask)
    return float((output - exact).abs().mean() / exact.abs().mean().clamp(min=1e-12))


def _counting(output: Tensor, mask: Tensor | None) -> Tensor:
    return output.float() if mask is None else output.float()[mask]


def numbers(timing: Timing, case: Case) -> dict[str, Any]:
    """A row's numbers: milliseconds of a batch, and how much goes through in a second."""
    median = timing.median
    return {
        "p50_ms": round(median * 1e3, 4),
        "p90_ms": round(timing.quantile(0.9) * 1e3, 4),
        "low_ms": round(timing.low * 1e3, 4),
        "high_ms": round(timing.high * 1e3, 4),
        "rounds": len(timing.seconds),
        "sentences_per_second": round(case.batch / median, 2),
        "tokens_per_second": round(case.tokens / median, 1),
    }


def best_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch's rows with `best_dense` and `best_subnetwork` (names of variants, or None) and `speedup`, by medians.

    Other software runs the model dense and counts as a dense path.
    """
    timed = [row for row in rows if row["status"] == "ok"]
    dense = min((row for row in timed if row["kind"] != "subnetwork"), key=_median, default=None)
    sparse = min((row for row in timed if row["kind"] == "subnetwork"), key=_median, default=None)
    for row in timed:
        row["speedup"] = None if dense is None else round(dense["p50_ms"] / row["p50_ms"], 3)
    return {
        "best_dense": None if dense is None else dense["variant"],
        "best_subnetwork": None if sparse is None else sparse["variant"],
        "speedup": None if sparse is None else sparse["speedup"],
        "rows": list(rows),
    }


def is_faster(case: Mapping[str, Any]) -> bool:
    """Whether the subnetwork is faster than the best dense path by more than noise."""
    return case["speedup"] is not None and case["speedup"] >= 1 + MARGIN


def verdict(case: Mapping[str, Any], other: Sequence[Mapping[str, Any]], better: Mapping[str, Any] | None) -> str:
    """What a batch's numbers say, in a plain sentence.

    Args:
        case: from `best_of`.
        other: what was measured of other patterns on this batch.
        better: of these the one that is faster than dense at the least sparsity.
    """
    rows = {row["variant"]: row for row in case["rows"]}
    if case["best_dense"] is None:
        return "no dense path ran"
    dense = f"{case['best_dense']} at {rows[case['best_dense']]['p50_ms']:.3g} ms"
    if better is not None:
        would = (
            f"{better['pattern']} at {better['sparsity']:.0%} would be faster "
            f"({better['variant']}, {better['p50_ms']:.3g} ms, {better['speedup']:.2f}x; random masks)"
        )
    else:
        would = "no other pattern that was tried would be faster" if other else "--what-if says which pattern would be"
    if case["best_subnetwork"] is None:
        failed = any(row["kind"] == "subnetwork" for row in case["rows"])
        lead = "no subnetwork gave right outputs" if failed else "nothing is pruned"
        return f"{lead}; the best dense path is {dense}; {would}"
    name = case["best_subnetwork"]
    own = f"{name} at {rows[name]['p50_ms']:.3g} ms"
    if case["speedup"] >= 1 and not is_faster(case):
        return f"even, within {MARGIN:.0%}: the best dense path is {dense}, the subnetwork's best {own}; {would}"
    if is_faster(case):
        return f"faster: the subnetwork, {own}, is {case['speedup']:.2f}x as fast as the best dense path, {dense}"
    return f"not faster: the best dense path is {dense}, the subnetwork's best {own} ({case['speedup']:.2f}x); {would}"


def _median(row: Mapping[str, Any]) -> float:
    return float(row["p50_ms"])
