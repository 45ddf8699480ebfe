"""Tiny tasks of every kind for methods that graft a student onto its teacher."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from torch import Tensor

from sparsebert.methods import METHODS, Context, Method
from sparsebert.models.prunable import prunable_matrices
from sparsebert.models.task_model import TaskModel
from sparsebert.patterns import parse_pattern


def batch(kind: str = "classification", seed: int = 0) -> dict[str, Tensor]:
    """Eight sequences of 8 tokens, the last two of half of them padding, and their answers."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, len(tiny.WORDS), (8, 8), generator=generator)
    ids[::2, 6:] = 0
    given = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if kind == "span":
        return {**given, "start_positions": ids[:, 0] % 4, "end_positions": ids[:, 1] % 6}
    return {**given, "labels": ids[:, 0] % 2 if kind == "classification" else ids[:, 0] / 10}


def make(
    name: str, task: str = "classification", kind: str = "bert", dtype: torch.dtype = torch.float32, **settings: Any
) -> Method:
    """A method and its teacher on a tiny model for a kind of task; half of the encoder is pruned."""
    method = METHODS[name]
    given = method.Settings(**settings)
    small = tiny.base(kind)
    method.shape(small, given)
    model = TaskModel(small, task, 2, head="linear", seed=0)
    teacher = TaskModel(tiny.base(kind, seed=1), task, 2, head="linear", seed=1).eval()
    context = Context(
        model=model,
        matrices=prunable_matrices(model.base),
        pattern=parse_pattern("unstructured"),
        sparsity=0.5,
        allocation="matrix",
        dtype=dtype,
        seed=0,
        untouched=False,
        teacher=teacher,
    )
    return method(context, given)


def without_dropout(method: Method) -> Method:
    """The method, its loss such that it can be compared with one put together by hand."""
    for model in (method.context.model, method.context.teacher):
        assert model is not None
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    return method
