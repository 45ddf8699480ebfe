"""How far each layer of a student is from its teacher's, with and without grafting (SPD's bound, empirically).

Without grafting a layer works on what the student's layers below it made, and their errors add up. Grafted, it works on
the teacher's own states, and its error is its own. Both are relative: |student - teacher| / |teacher| over the real
tokens of a sample of validation rows, in the Frobenius norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsebert._load import cache_dir
from sparsebert.errors import UserError
from sparsebert.models.capture import Capture, Needs, layers_of
from sparsebert.models.storage import load_model
from sparsebert.models.task_model import TaskModel
from sparsebert.reports.analysis.base import Analysis, Finding, Options
from sparsebert.reports.analysis.opened import Batch, OpenRun, open_run
from sparsebert.reports.runs import RunRecord
from sparsebert.reports.speed_table import Table
from sparsebert.training.hardware import choose_attention

__all__ = ["LAYERS", "layer_errors"]


def _teacher_folder(run: RunRecord, options: Options) -> Path | None:
    about = run.result.get("teacher", {})
    if options.teacher is not None:
        return options.teacher.expanduser()
    if "folder" in about:
        return Path(about["folder"])
    return cache_dir() / "teachers" / about["key"] if "key" in about else None


def _unfit(run: RunRecord, options: Options) -> str | None:
    folder = _teacher_folder(run, options)
    if folder is None:
        return "it had no teacher (--teacher names a dense run to compare with)"
    if not (folder / "model").is_dir():
        return "its teacher is no longer where it was (--teacher names a dense run to compare with)"
    return "it is its own teacher" if folder.resolve() == run.folder.resolve() else None


def _layers(runs: Sequence[RunRecord], options: Options) -> Finding:
    found: dict[str, Any] = {}
    tables = []
    for run in runs:
        folder = _teacher_folder(run, options)
        if folder is None:
            raise UserError(f"{run.label}: it had no teacher")
        opened = open_run(run, options)
        teacher, tokens, masks, _ = load_model(folder / "model")
        _check(run, opened, teacher, tokens, masks)
        teacher.to(opened.device).requires_grad_(False)
        choose_attention(teacher.base, torch.float32)
        options.say(f"layers: {run.label}")
        validation = opened.validation()
        alone, grafted = layer_errors(opened.model, teacher, [batch for _, batch in opened.batches(validation)])
        found[run.label] = {"rows": len(validation), "alone": alone, "grafted": grafted}
        rows = [
            (str(number), f"{one:.4f}", f"{other:.4f}", f"{one / other:.2f}" if other else "-")
            for number, (one, other) in enumerate(zip(alone, grafted, strict=True), 1)
        ]
        heads = ("layer", "without grafting", "grafted", "ratio")
        tables.append(Table(f"relative error of the layers of {run.label} against the teacher", heads, rows))
    return Finding({"runs": found}, tables)


def _check(run: RunRecord, opened: OpenRun, teacher: TaskModel, tokens: Any, masks: dict[str, Tensor]) -> None:
    """A UserError unless layers of one can run in the place of the other's."""
    mine, theirs = opened.model.base, teacher.base
    counts = len(layers_of(mine)), len(layers_of(theirs))
    sizes = [(base.config.model_type, base.config.hidden_size) for base in (mine, theirs)]
    if masks:
        raise UserError(f"{run.label}: the teacher's own weights are pruned; --teacher takes a dense run")
    if counts[0] != counts[1] or sizes[0] != sizes[1]:
        raise UserError(f"{run.label}: its {counts[0]} layers do not match the teacher's {counts[1]} one for one")
    if tokens.get_vocab() != opened.tokenizer.get_vocab():
        raise UserError(f"{run.label}: the teacher has another vocabulary")


class _Against:
    """Runs a student's layer on the inputs of the teacher's, whenever that runs; adds up squared errors."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        self.student = student
        self.real: Tensor | None = None
        """`[batch, seq]`, True at tokens that are no padding."""
        self.squared = torch.zeros((), dtype=torch.float64)
        self.handle = teacher.register_forward_hook(self._hook, with_kwargs=True)

    def _hook(self, module: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
        self.squared += _squared(_state(self.student(*inputs, **named)) - _state(output), self.real)


@torch.no_grad()
def layer_errors(student: TaskModel, teacher: TaskModel, batches: Sequence[Batch]) -> tuple[list[float], list[float]]:
    """Relative error of every layer's output: of the student alone, and grafted layer by layer.

    Args:
        student, teacher: in eval mode, of as many layers, widths and kind of attention.
        batches: as `Collator` makes them.
    """
    count = len(layers_of(student.base))
    needs = Needs(hidden=frozenset(range(1, count + 1)))
    norms, alone = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    pairs = zip(layers_of(student.base), layers_of(teacher.base), strict=True)
    against = [_Against(mine, theirs) for mine, theirs in pairs]
    try:
        for batch in batches:
            ids, mask, types = batch["input_ids"], batch.get("attention_mask"), batch.get("token_type_ids")
            real = None if mask is None else mask.bool()
            for each in against:
                each.real = real
            with Capture(teacher.base, needs) as theirs:
                teacher.encode(ids, mask, types)
            with Capture(student.base, needs) as mine:
                student.encode(ids, mask, types)
            for layer in range(count):
                target = theirs.states.hidden[layer + 1]
                norms[layer] += _squared(target, real)
                alone[layer] += _squared(mine.states.hidden[layer + 1] - target, real)
    finally:
        for each in against:
            each.handle.remove()
    grafted = torch.stack([each.squared for each in against])
    return (alone / norms).sqrt().tolist(), (grafted / norms).sqrt().tolist()


def _state(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _squared(state: Tensor, real: Tensor | None) -> Tensor:
    """Sum of squares over the real tokens, float64 on the CPU."""
    kept = state if real is None else state[real]
    return kept.double().square().sum().cpu()


LAYERS = Analysis("error of each layer against the teacher's, with and without grafting", _layers, _unfit)
