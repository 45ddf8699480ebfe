"""Masks with as many weights kept in every matrix as a run's, chosen by other scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sparsebert.data import demo_model_path
from sparsebert.errors import UserError
from sparsebert.models.load import load_base, state_fingerprint
from sparsebert.models.plain import plain_state
from sparsebert.ops.bits import block_sum, expand_grid, unpack_bits
from sparsebert.patterns import ScoreGroup, parse_pattern
from sparsebert.reports.runs import RunRecord

__all__ = ["magnitude_masks", "pretrained_weights", "random_masks"]


def magnitude_masks(run: RunRecord, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of one-shot magnitude pruning, of the run's pattern and of its sparsity in each matrix.

    Args:
        weights: the pre-trained parameters by name.
    """
    groups = _groups(run)
    named = {view.matrix.name: weights[f"{view.matrix.name}.weight"] for group in groups for view in group.views}
    return _select(run, groups, parse_pattern(_pattern(run)).magnitude(groups, named))


def random_masks(run: RunRecord, seed: int) -> dict[str, Tensor]:
    """The run's masks shuffled: as many units kept in every matrix (or group of matrices that go together), at random
    places."""
    groups = _groups(run)
    generator = torch.Generator().manual_seed(seed)
    return _select(run, groups, [torch.rand(group.shape, generator=generator) for group in groups])


def pretrained_weights(run: RunRecord) -> dict[str, Tensor]:
    """The parameters that the run began with, by name.

    Raises:
        UserError: they are not at hand, are others by now, or are not of the run's shapes.
    """
    source = str(run.config["run"].get("model", ""))
    base, _ = load_base(str(demo_model_path()) if source == "demo" else source)
    state = plain_state(base)
    name = Path(source).name
    if state_fingerprint(state) != run.base:
        raise UserError(f"{run.label}: model {name} is not what the run began with")
    for matrix in run.matrices.values():
        weight = state.get(f"{matrix.name}.weight")
        if weight is None or tuple(weight.shape) != matrix.shape:
            raise UserError(f"{run.label}: its layers are not those of its pre-trained model {name}")
    last = max((matrix.layer for matrix in run.matrices.values() if matrix.layer is not None), default=-1)
    if _layers(state, run) != last + 1:
        raise UserError(f"{run.label}: it has fewer layers than its pre-trained model {name}")
    return state


def _layers(state: Mapping[str, Tensor], run: RunRecord) -> int:
    """How many encoder layers the pre-trained model has."""
    first = next(matrix.name for matrix in run.matrices.values() if matrix.layer == 0)
    before, after = first.split(".0.", 1)
    count = 0
    while f"{before}.{count}.{after}.weight" in state:
        count += 1
    return count


def _pattern(run: RunRecord) -> str:
    return str(run.result["pattern"])


def _groups(run: RunRecord) -> list[ScoreGroup]:
    masks = run.masks()
    return parse_pattern(_pattern(run)).groups([matrix for name, matrix in run.matrices.items() if name in masks])


def _select(run: RunRecord, groups: list[ScoreGroup], scores: list[Tensor]) -> dict[str, Tensor]:
    pattern, masks = parse_pattern(_pattern(run)), run.masks()
    chosen: dict[str, Tensor] = {}
    for group, score in zip(groups, scores, strict=True):
        view = group.views[0]
        units = block_sum(masks[view.matrix.name].float(), view.grid) > 0
        kept = torch.zeros(group.shape, dtype=torch.bool)
        if count := int(units.sum()):
            bits = pattern.select([group], [score], 1.0 - count / units.numel(), "matrix")[0]
            kept = unpack_bits(bits, group.shape)
        for view in group.views:
            chosen[view.matrix.name] = expand_grid(kept.reshape(view.grid), view.matrix.shape)
    # Patterns of whole heads or neurons leave some masked matrices alone.
    return {name: chosen.get(name, mask) for name, mask in masks.items()}
