"""Small sparsified models with every head, for the tests of sparse folders."""

from __future__ import annotations

from typing import Any

import tiny
import torch
import transformers
from torch import Tensor, nn

from sparsebert.models.task_model import TaskModel
from sparsebert.nn import sparsify

PREFIX = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
HEADS = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
FORMATS = ("unstructured", "blocks:4x2", "semi_structured:2:4", "compact", "dense")
IDS = torch.tensor([[2, 5, 9, 13, 3, 0], [2, 14, 6, 7, 8, 3]])


@torch.no_grad()
def prune(model: nn.Module, format: str = "unstructured", seed: int = 0) -> None:
    """Random weights everywhere, and zeros that `format` can hold in the encoder's linears."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.3, generator=generator)
        if ".layer." not in name or parameter.dim() != 2:
            continue
        n, k = parameter.shape
        if format.startswith("blocks"):
            kept = (torch.rand(n // 4, k // 2, generator=generator) < 0.4).repeat_interleave(4, 0)
            parameter *= kept.repeat_interleave(2, 1)
        elif format.startswith("semi"):
            parameter *= torch.rand(n, k // 4, 4, generator=generator).argsort(2).argsort(2).view(n, k) < 2
        elif format == "compact":
            parameter *= (torch.rand(n, 1, generator=generator) < 0.5) & (torch.rand(k, generator=generator) < 0.5)
        else:
            parameter *= torch.rand(n, k, generator=generator) < 0.3


def plain_model(kind: str = "bert", head: str = "ForSequenceClassification", seed: int = 0) -> Any:
    """An ordinary model of transformers with pruned weights."""
    model = getattr(transformers, PREFIX[kind] + head)(tiny.config(kind)).eval()
    prune(model, seed=seed)
    return model


def sparse_model(kind: str = "bert", head: str = "ForSequenceClassification", format: str = "unstructured") -> Any:
    """A sparsified one."""
    model = getattr(transformers, PREFIX[kind] + head)(tiny.config(kind)).eval()
    prune(model, format)
    return sparsify(model, format=format, include="*.layer.*")


def task_model(model_type: str = "bert", format: str = "unstructured", **options: Any) -> TaskModel:
    """A `TaskModel` with a sparsified base."""
    base = tiny.base(model_type)
    prune(base, format)
    sparsify(base, format=format, include="*.layer.*")
    arguments = {"kind": "classification", "num_labels": 3, "head_width": 6, "seed": 0, **options}
    return TaskModel(base, **arguments).eval()


@torch.no_grad()
def outputs(model: Any, ids: Tensor = IDS) -> list[Tensor]:
    """Every tensor of the output, with the first tokens of the second row as padding."""
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    found = model(input_ids=ids, attention_mask=mask)
    return [value for value in found.values() if isinstance(value, Tensor)]


def same(first: Any, second: Any) -> bool:
    """Whether two models have the same bits, in their state and in their outputs."""
    ours, theirs = first.state_dict(), second.state_dict()
    return (
        type(first) is type(second)
        and list(ours) == list(theirs)
        and all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)
        and all(torch.equal(a, b) for a, b in zip(outputs(first), outputs(second), strict=True))
    )
