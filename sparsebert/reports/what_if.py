"""Which pattern would be faster: the same model under random masks of other patterns and sparsities."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsebert.errors import UserError
from sparsebert.nn.choose import MARGIN
from sparsebert.patterns import parse_pattern
from sparsebert.reports.inputs import Case
from sparsebert.reports.layers import Clock, format_of, random_scores
from sparsebert.reports.subject import Readout, Subject, put_masks, select_masks
from sparsebert.reports.variants import PRECISIONS, Variant, build, formats_that_fit, in_precision

__all__ = ["SPARSITIES", "suggestion", "what_if"]

SPARSITIES = (0.5, 0.7, 0.8, 0.9)

Run = Callable[[], Tensor]


def _patterns(precisions: Sequence[str]) -> list[tuple[str, str]]:
    """Patterns to try, each with the precision that its kernels are fastest in."""
    best = precisions[-1]
    pairs = "block:8x2" if best == "bf16" else "block:8x1"
    tried = [("unstructured", precision) for precision in precisions]
    return [*tried, (pairs, best), ("block:16x16", best), ("2:4", best), ("neurons", best)]


def what_if(
    subject: Subject,
    base: Readout,
    precisions: Sequence[str],
    dense: dict[str, Run],
    case: Case,
    inputs: dict[str, Tensor],
    agrees: Callable[[Tensor, Tensor, str], str | None],
    clock: Clock,
    seed: int,
) -> list[dict[str, Any]]:
    """Times every pattern at the subnetwork's own sparsity and at some greater ones, in turns with dense calls.

    Args:
        subject: whose masked matrices (the encoder's, where there are none) are pruned at random.
        base: the dense masked model in fp32, on its device.
        precisions: keys of `PRECISIONS`.
        dense: the best dense calls of this batch, by name.
        case, inputs: the batch.
        agrees: gets an output, the dense masked model's, and the precision; says why they differ, or None.
        clock: times the calls.
        seed: of the masks.

    Returns:
        For each: `case`, `pattern`, `sparsity` (of the units that the pattern prunes), `variant`,
        `p50_ms`, `dense_ms` and `speedup`; or `reason` where its output was wrong.
    """
    runs: dict[str, Run] = dict(dense)
    rows: dict[str, dict[str, Any]] = {}
    for pattern, precision in _patterns(precisions):
        for sparsity in _sparsities(pattern, subject.sparsity):
            variant = Variant("subnetwork", format_of(pattern), precision)
            row = {"case": case.name, "pattern": pattern, "sparsity": sparsity, "variant": variant.name}
            pruned = _pruned(base, subject, pattern, sparsity, seed)
            if pruned is None:
                continue
            fit, _ = formats_that_fit(pruned, PRECISIONS[precision])
            if variant.way not in fit:
                continue
            model, _ = build(variant, in_precision(pruned, precision), dict.fromkeys(fit[variant.way], variant.way))
            with torch.inference_mode():
                reason = agrees(model(**inputs), pruned(**inputs), precision)
            name = f"{pattern} {sparsity} {precision}"
            rows[name] = row if reason is None else {**row, "reason": reason}
            if reason is None:
                runs[name] = _call(model, inputs)
    with torch.inference_mode():
        timings = clock(runs)
    best = min(timings[name].median for name in dense)
    for name in rows.keys() & timings.keys():
        took = timings[name].median
        rows[name] |= {
            "p50_ms": round(took * 1e3, 4),
            "dense_ms": round(best * 1e3, 4),
            "speedup": round(best / took, 3),
        }
    return list(rows.values())


def suggestion(rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The pattern that is faster than dense at the least sparsity; of equal ones the fastest. None where none is."""
    faster = [row for row in rows if row.get("speedup", 0) >= 1 + MARGIN]
    return min(faster, key=lambda row: (row["sparsity"], -row["speedup"]), default=None)


def _sparsities(pattern: str, own: float) -> list[float]:
    if pattern == "2:4":
        return [0.5]
    floor = round(own, 2)
    return sorted({*([floor] if floor else []), *(share for share in SPARSITIES if share > floor)})


def _pruned(base: Readout, subject: Subject, pattern: str, sparsity: float, seed: int) -> Readout | None:
    """A copy of the model under a random mask; None where the pattern does not fit its matrices."""
    chosen = parse_pattern(pattern)
    try:
        masks = select_masks(chosen, subject.matrices, sparsity, random_scores(chosen, subject.matrices, seed))
    except UserError:
        return None
    copied = copy.deepcopy(base)
    _fill(copied, subject, seed)
    put_masks(copied.base, masks)
    return copied


@torch.no_grad()
def _fill(readout: Readout, subject: Subject, seed: int) -> None:
    """New random weights of the old ones' size where the subnetwork's own are zero."""
    generator = torch.Generator().manual_seed(seed)
    for matrix in subject.matrices:
        weight: Tensor = readout.base.get_submodule(matrix.name).weight  # type: ignore[assignment]
        spread = float(weight[weight != 0].std()) if bool((weight != 0).any()) else 0.02
        noise = torch.randn(matrix.shape, generator=generator).to(weight) * spread
        weight.copy_(torch.where(weight != 0, weight, noise))


def _call(model: Readout, inputs: dict[str, Tensor]) -> Run:
    return lambda: model(**inputs)
