"""What is measured: a run's model, or a pre-trained one, with the masks that it has or that are put on it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsebert.data import Encoded, TaskData, demo_model_path
from sparsebert.errors import UserError
from sparsebert.models.load import load_base
from sparsebert.models.prunable import prunable_matrices
from sparsebert.models.sparse_folder import SECTION
from sparsebert.models.sparse_load import AutoSparseModel
from sparsebert.models.storage import load_model
from sparsebert.models.task_model import TaskModel
from sparsebert.nn import SparseLinear
from sparsebert.ops.bits import expand_grid, unpack_bits
from sparsebert.patterns import Matrix, Pattern, parse_pattern
from sparsebert.training.config import Config, load_run_task
from sparsebert.training.folder import RunFolder
from sparsebert.training.scoring import encode_validation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["UNKNOWN", "Readout", "Subject", "load_subject", "put_masks", "select_masks"]


UNKNOWN = "unknown pattern"
"""The pattern of a sparse model that was saved without its name."""


class Readout(nn.Module):
    """A model whose forward takes ids and mask, and returns one tensor: what variants are compared by.

    Args:
        model: a `TaskModel`, or a base model alone.
    """

    def __init__(self, model: TaskModel | PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @property
    def base(self) -> PreTrainedModel:
        """The encoder."""
        return self.model.base if isinstance(self.model, TaskModel) else self.model

    @property
    def per_token(self) -> bool:
        """Whether the output is `[batch, seq, ...]`, of which padding means nothing."""
        return not isinstance(self.model, TaskModel) or self.model.kind == "span"

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits `[batch, ...]` (spans: `[batch, seq, 2]`), or the last hidden state `[batch, seq, width]`."""
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        if not isinstance(self.model, TaskModel):
            return output.last_hidden_state
        if self.model.kind == "span":
            return torch.stack((output["start_logits"], output["end_logits"]), -1)
        return output["logits"]

    def twin(self) -> Readout:
        """A copy whose modules can be replaced; parameters and buffers are shared."""
        shared = {id(tensor): tensor for tensor in chain(self.parameters(), self.buffers())}
        return copy.deepcopy(self, shared)  # type: ignore[arg-type]


@dataclass
class Subject:
    """A model to measure, in fp32 on the CPU, pruned weights exactly zero."""

    where: str
    """As the user named it."""
    readout: Readout
    tokenizer: PreTrainedTokenizerBase | None
    """None where the model's folder has none."""
    masks: dict[str, Tensor] = field(default_factory=dict)
    """Module name in the base to bool mask, True where kept."""
    pattern: str | None = None
    """Of the masks."""
    imposed: bool = False
    """Whether the masks were put on by magnitude, to measure speed alone."""
    target: float | None = None
    """The sparsity that imposed masks were made for."""
    folder: RunFolder | None = None
    """Of the run, where it is one."""
    config: Config | None = None
    """Of the run."""
    result: dict[str, Any] | None = None
    """What the run's result.json says; None for a run that is not finished."""
    _task: tuple[TaskData, dict[str, Encoded]] | None = None

    @property
    def matrices(self) -> list[Matrix]:
        """The matrices that are masked, in the order they run; all of the encoder's where none is."""
        encoder = prunable_matrices(self.readout.base)
        return [matrix for matrix in encoder if matrix.name in self.masks] or encoder

    @property
    def sparsity(self) -> float:
        """Pruned share of the masked linears."""
        masks = [self.masks[matrix.name] for matrix in self.matrices if matrix.name in self.masks]
        return sum(int((~mask).sum()) for mask in masks) / max(1, sum(mask.numel() for mask in masks))

    def task(self, data_dir: str | None = None) -> tuple[TaskData, dict[str, Encoded]]:
        """The run's task and its encoded validation sets (see `encode_validation`).

        Raises:
            UserError: this is no run, or its data are not at hand.
        """
        if self.config is None or not isinstance(self.readout.model, TaskModel):
            raise UserError(f"{self.where}: is no run, so that it has no validation set")
        if self._task is None:
            run = dataclasses.replace(self.config.run, data_dir=data_dir or self.config.run.data_dir)
            data = load_run_task(run, require_train=False)
            ids = {name: index for index, name in enumerate(self.readout.model.label_names)}
            self._task = data, encode_validation(data, self.tokenizer, run, ids)
        return self._task


def load_subject(where: str, pattern: str | None = None, sparsity: float | None = None) -> Subject:
    """The model that `where` names.

    Args:
        where: a run's folder, a model that a run saved, a sparse model's folder (of which a task head of transformers
            is left out), a Hugging Face checkpoint's folder or hub id, or "demo".
        pattern, sparsity: of masks to put on a model that has none: the smallest weights of each matrix go.

    Raises:
        UserError: nothing there, a run without a model, a damaged part, or a pattern for a model that has its own.
    """
    path = Path(where).expanduser()
    if (path / "config.yaml").is_file():
        subject = _run(where, RunFolder(path))
    elif _is_sparse(path):
        subject = _sparse(where, path)
    elif (path / "head.json").is_file():
        subject = _saved(where, path)
    else:
        source = str(demo_model_path()) if where == "demo" else where
        base, tokenizer = load_base(source)
        subject = Subject(where, Readout(base).eval(), tokenizer)
    if pattern is None and sparsity is None:
        return subject
    if subject.masks:
        raise UserError(
            f"pattern, sparsity: {where} has masks of its own ({subject.pattern}); give a model without, or leave these"
        )
    chosen = parse_pattern(pattern or "unstructured")
    weights = {matrix.name: _weight(subject.readout.base, matrix.name) for matrix in subject.matrices}
    scores = chosen.magnitude(chosen.groups(subject.matrices), weights)
    target = chosen.default_sparsity if sparsity is None else sparsity
    subject.masks = select_masks(chosen, subject.matrices, target, scores)
    subject.pattern, subject.imposed, subject.target = chosen.spec, True, target
    put_masks(subject.readout.base, subject.masks)
    return subject


def select_masks(
    pattern: Pattern, matrices: Sequence[Matrix], sparsity: float, scores: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Masks of `matrices` at a sparsity of each of them; module name to bool mask, True where kept.

    Args:
        scores: one tensor for each of `pattern.groups(matrices)`.

    Raises:
        UserError: a sparsity that the pattern cannot have, or a matrix that it does not fit.
    """
    groups = pattern.groups(matrices)
    masks = {}
    for group, bits in zip(groups, pattern.select(groups, scores, sparsity, "matrix"), strict=True):
        units = unpack_bits(bits, group.shape)
        for view in group.views:
            masks[view.matrix.name] = expand_grid(units.reshape(view.grid), view.matrix.shape)
    return masks


@torch.no_grad()
def put_masks(base: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Sets what the masks prune to exactly 0, in place."""
    for name, mask in masks.items():
        weight = _weight(base, name)
        weight.copy_(torch.where(mask.to(weight.device), weight, weight.new_zeros(())))


def _weight(base: nn.Module, name: str) -> Tensor:
    return base.get_submodule(name).weight  # type: ignore[return-value]


def _run(where: str, folder: RunFolder) -> Subject:
    from sparsebert.training.arguments import parse_arguments

    if not folder.model.is_dir():
        raise UserError(
            f"{folder.root}: holds no saved model, the run is not finished; "
            f"go on with:  python -m sparsebert.train --resume {folder.root}"
        )
    config, _, _ = parse_arguments(["--config", str(folder.config)])
    subject = _saved(where, folder.model)
    subject.folder, subject.config = folder, config
    if folder.result.is_file():
        try:
            subject.result = json.loads(folder.result.read_text(encoding="utf-8"))
            if not isinstance(subject.result, dict) or not isinstance(subject.result.get("metrics"), dict):
                raise TypeError("metrics should be a table")
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{folder.result}: damaged ({error}); remove it to measure the model all the same"
            ) from error
    return subject


def _saved(where: str, path: Path) -> Subject:
    model, tokenizer, masks, info = load_model(path)
    return Subject(where, Readout(model).eval(), tokenizer, masks, info["pattern"] if masks else None)


def _is_sparse(folder: Path) -> bool:
    """Whether `save_sparse` wrote this folder; one that cannot be read is for others to complain about."""
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return isinstance(config, dict) and SECTION in config
    return False


def _sparse(where: str, folder: Path) -> Subject:
    """A sparse model with its weights dense again, which is what variants are built of."""
    model = AutoSparseModel.from_pretrained(folder)
    pattern = model.provenance["pattern"] or UNKNOWN
    if not isinstance(model, TaskModel):
        # A task head of transformers has its own outputs: the encoder below it is measured.
        model = model.base_model
    model = model.float()
    base = model.base if isinstance(model, TaskModel) else model
    masks = {}
    for name, module in list(base.named_modules()):
        if isinstance(module, SparseLinear):
            linear = module.to_linear().requires_grad_(False)
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, linear)
            masks[name] = linear.weight != 0
    return Subject(where, Readout(model).eval(), None, masks, pattern)
