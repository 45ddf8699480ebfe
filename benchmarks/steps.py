"""Training steps to time: Adapting by Pruning, dense fine-tuning, and masking the eager way.

Run as a script, takes a few steps of one kind and prints the peak resident memory: one process a kind, since a
process's peak never falls.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from sparsebert.methods import METHODS
from sparsebert.methods.base import Context
from sparsebert.models.prunable import prunable_matrices
from sparsebert.models.task_model import TaskModel
from sparsebert.patterns import parse_pattern

KINDS = ("adapt_prune", "dense", "dense, no dropout", "eager")
SHAPES: dict[str, dict[str, int]] = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "tiny": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
}


class _TopK(torch.autograd.Function):
    """The binariser of movement pruning's code: sorts all scores in every forward; identity backward."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, sparsity: float) -> Tensor:
        mask = scores.clone()
        _, order = scores.flatten().sort(descending=True)
        keep = int((1 - sparsity) * scores.numel())
        flat = mask.flatten()
        flat[order[keep:]] = 0.0
        flat[order[:keep]] = 1.0
        return mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _EagerMaskedLinear(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.scores = nn.Parameter(torch.randn_like(linear.weight) * 0.001 + 0.01)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * _TopK.apply(self.scores, 0.5), self.bias)


def make_step(
    kind: str, shape: str, batch: int, seq: int, dtype: torch.dtype, device: str = "cpu", attention: str = "eager"
) -> Callable[[], None]:
    """A function that takes one optimiser step of `kind` on random tokens `[batch, seq]`, forward to optimiser."""
    torch.manual_seed(0)
    base = BertModel(BertConfig(**SHAPES[shape], attn_implementation=attention), add_pooling_layer=False)
    model = TaskModel(base, "classification", 2, seed=0).to(device)
    tokens = torch.randint(1000, 30000, (batch, seq), device=device)
    labels = torch.arange(batch, device=device) % 2
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    makers = {"adapt_prune": _adapt_prune, "dense": _dense, "dense, no dropout": _no_dropout, "eager": _eager}
    module, groups, before, after = makers[kind](model, dtype)
    optimizer = torch.optim.AdamW(groups, lr=1e-5, weight_decay=0.0, fused=True)
    module.train()
    taken = 0

    def step() -> None:
        nonlocal taken
        taken += 1
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            loss = module(**inputs)["loss"]
        loss.backward()
        before(taken)
        optimizer.step()
        after(taken)
        optimizer.zero_grad()

    return step


Parts = tuple[nn.Module, list[Any], Callable[[int], Any], Callable[[int], Any]]


def _adapt_prune(model: TaskModel, dtype: torch.dtype) -> Parts:
    method = METHODS["adapt_prune"]
    context = Context(model, prunable_matrices(model.base), parse_pattern("unstructured"), 0.5, "global", dtype, 0)
    prune = method(context, method.Settings())
    phase = prune.phases()[-1]
    phase.start()
    phase.loaded()
    # Steps of a long run: the mask moves with every one of them.
    return (
        prune.module,
        phase.parameter_groups(1e-3),
        lambda n: phase.before_step(n, 100),
        lambda n: phase.after_step(n, 100),
    )


def _dense(model: TaskModel, dtype: torch.dtype) -> Parts:
    return model, [{"params": list(model.parameters())}], lambda n: None, lambda n: None


def _no_dropout(model: TaskModel, dtype: torch.dtype) -> Parts:
    model.set_base_dropout(False)
    return _dense(model, dtype)


def _eager(model: TaskModel, dtype: torch.dtype) -> Parts:
    model.base.requires_grad_(False)
    for matrix in prunable_matrices(model.base):
        parent, _, child = matrix.name.rpartition(".")
        owner = model.base.get_submodule(parent)
        setattr(owner, child, _EagerMaskedLinear(getattr(owner, child)))
    model.set_base_dropout(False)
    return model, [{"params": [p for p in model.parameters() if p.requires_grad]}], lambda n: None, lambda n: None


def main(kind: str, shape: str, batch: int, seq: int, dtype: str) -> None:
    """Prints how far the peak resident memory rises above that of the imports, in bytes."""
    before = peak_memory()
    step = make_step(kind, shape, batch, seq, getattr(torch, dtype))
    for _ in range(4):
        step()
    print(peak_memory() - before)


def peak_memory() -> int:
    """Peak resident memory in bytes. Not getrusage's: that of a child begins at its parent's."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
