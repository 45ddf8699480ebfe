"""The mask of a finished run, taken over by another run on the same base."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsebert.errors import UserError
from sparsebert.methods.base import Context
from sparsebert.models.folder import first_line
from sparsebert.models.load import model_fingerprint
from sparsebert.models.masks import read_masks
from sparsebert.models.prunable import all_matrices
from sparsebert.ops.bits import block_sum, expand_grid, pack_bits
from sparsebert.patterns import Matrix, ScoreGroup, parse_pattern, units_to_prune

__all__ = ["GivenMask", "read_given_mask"]


@dataclass(frozen=True)
class GivenMask:
    """The mask of another run."""

    bits: list[Tensor]
    """Packed, one uint8 tensor per score group of this run's pattern."""
    sparsity: float
    """The target that the other run was given."""
    about: dict[str, Any]
    """Where it is from, for the result."""


def read_given_mask(run: str, context: Context) -> GivenMask:
    """The mask that a finished run saved, checked to be one for this run.

    Args:
        run: the run's folder.
        context: this run's, its base as it was loaded.

    Raises:
        UserError: no finished run, a dense one, or a mask of another base, pattern, masked parts or (where one was
            asked for) sparsity than this run's.
    """
    root = Path(run).expanduser()
    path = root / "model" / "masks.safetensors"
    if not path.is_file():
        raise UserError(f"mask {run}: expected the folder of a finished run (it has no model/masks.safetensors)")
    base = context.model.base
    info = _json(root / "model" / "head.json").get("info", {})
    if info.get("base_sha256") != model_fingerprint(base):
        found = info.get("base_model", "another model")
        raise UserError(f"mask {run}: belongs to another base ({found}); give --model what that run was given")
    known = {matrix.name: matrix for matrix in all_matrices(base)}
    masks, pattern, fingerprint = read_masks(path, known)
    if not masks:
        raise UserError(f"mask {run}: that run pruned nothing; give one of a method that prunes")
    if parse_pattern(pattern).spec != context.pattern.spec:
        mine = context.pattern.spec
        raise UserError(f"mask {run}: of pattern {pattern}, and this run's is {mine}; add --pattern {pattern}")
    groups = context.pattern.groups(context.matrices)
    _check_parts(run, known, masks, groups)
    units = [_units(run, group, masks) for group in groups]
    sparsity = _sparsity(run, root, context, units)
    about = {"mask": {"run": run, "sha256": fingerprint, "method": info.get("method"), "task": info.get("task")}}
    return GivenMask([pack_bits(unit) for unit in units], sparsity, about)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, as a run writes it")
    return content


def _check_parts(
    run: str, known: Mapping[str, Matrix], masks: Mapping[str, Tensor], groups: Sequence[ScoreGroup]
) -> None:
    mine = {view.matrix.name for group in groups for view in group.views}
    if mine != set(masks):
        theirs, ours = (_parts(known[name] for name in known if name in names) for names in (masks, mine))
        raise UserError(f"mask {run}: masks {theirs}, this run {ours}; add --masked {theirs}")


def _parts(matrices: Iterable[Matrix]) -> str:
    """As `--masked` takes them."""
    return " ".join(dict.fromkeys("encoder" if m.layer is not None else m.component for m in matrices))


def _units(run: str, group: ScoreGroup, masks: Mapping[str, Tensor]) -> Tensor:
    """The mask as bools of the group's shape; every view must say the same, and no unit may be kept in part."""
    units: Tensor | None = None
    for view in group.views:
        mask = masks[view.matrix.name]
        found = block_sum(mask.float(), view.grid) > 0
        if not torch.equal(expand_grid(found, view.matrix.shape), mask) or (
            units is not None and not torch.equal(found.reshape(group.shape), units)
        ):
            raise UserError(f"mask {run}: {view.matrix.name}: units of its pattern are pruned in part")
        units = found.reshape(group.shape)
    assert units is not None  # a group covers at least one matrix
    return units


def _sparsity(run: str, root: Path, context: Context, units: Sequence[Tensor]) -> float:
    """The sparsity that was asked of the other run; if its result is gone, the mask's own."""
    total = sum(unit.numel() for unit in units)
    pruned = total - sum(int(unit.sum()) for unit in units)
    target = pruned / total
    if (root / "result.json").is_file():
        target = float(_json(root / "result.json").get("sparsity", {}).get("target", target))
    asked = context.sparsity
    if context.sparsity_asked:
        fits = {units_to_prune(asked, total), sum(units_to_prune(asked, unit.numel()) for unit in units)}
        if pruned not in fits:
            raise UserError(f"mask {run}: prunes {target:g}, and --sparsity asks for {asked:g}; leave --sparsity out")
        return asked
    return target
