"""What a head sees of a frozen base, kept; and a new head trained on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsebert.data import Encoded
from sparsebert.models.task_model import LinearHead, ScalarMixHead, TaskModel
from sparsebert.reports.analysis.opened import OpenRun
from sparsebert.training.evaluation import score

__all__ = ["Features", "features_of", "score_head", "train_head"]

_BATCH = 32
_RATE = 1e-3


@dataclass(frozen=True)
class Features:
    """A head's inputs for a set of rows."""

    states: list[Tensor]
    """One `[rows, width]` for each input of the head: one, or one for each layer."""
    one: bool
    """Whether the head takes a single tensor, no list."""
    encoded: Encoded
    """The rows."""

    def take(self, rows: Tensor | None = None) -> Any:
        """The head's input for some rows, or all."""
        states = self.states if rows is None else [state[rows] for state in self.states]
        return states[0] if self.one else states


@torch.no_grad()
def features_of(opened: OpenRun, encoded: Encoded) -> Features:
    """Runs the base over all rows."""
    model, taken = opened.model, list[Any]()
    handle = model.head.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
    parts: list[list[Tensor]] = []
    order: list[int] = []
    try:
        for chosen, batch in opened.batches(encoded):
            batch.pop("labels", None)
            model(**batch)
            features = taken.pop()
            parts.append([features] if isinstance(features, Tensor) else list(features))
            order += chosen
    finally:
        handle.remove()
    back = torch.tensor(order).argsort().to(opened.device)
    states = [torch.cat([part[place].float() for part in parts])[back] for place in range(len(parts[0]))]
    return Features(states, model.head_kind != "mlp", encoded)


def train_head(model: TaskModel, features: Features, steps: int, seed: int) -> nn.Module:
    """A new head, trained by AdamW with a linearly falling rate on kept features; the model's own is left alone."""
    generator = torch.Generator().manual_seed(seed)
    head = _new_head(model.head, generator)
    head.requires_grad_(True).eval()  # without dropout: few steps
    device = features.states[0].device
    labels = torch.from_numpy(np.ascontiguousarray(features.encoded.labels)).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=_RATE, weight_decay=0.0)
    with torch.enable_grad():
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = _RATE * (1.0 - step / steps)
            rows = torch.randint(len(labels), (min(_BATCH, len(labels)),), generator=generator).to(device)
            logits = head(features.take(rows))
            if model.kind == "regression":
                loss = F.mse_loss(logits.squeeze(-1), labels[rows].float())
            else:
                loss = F.cross_entropy(logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head.requires_grad_(False)


def _new_head(like: nn.Module, generator: torch.Generator) -> nn.Module:
    if isinstance(like, ScalarMixHead):
        width, hidden = like.dense.in_features, like.dense.out_features
        head: nn.Module = ScalarMixHead(
            like.mix.numel(), width, like.output.out_features, hidden, like.dropout.p, generator
        )
        return head.to(like.mix.device)
    assert isinstance(like, LinearHead)
    head = LinearHead(like.output.in_features, like.output.out_features, like.dropout.p, generator)
    return head.to(like.output.weight.device)


@torch.no_grad()
def score_head(opened: OpenRun, head: nn.Module, features: Features) -> float:
    """The task's metric of a head on kept features."""
    head.eval()
    logits = head(features.take())
    if opened.model.kind == "regression":
        logits = logits.squeeze(-1)
    return score({"logits": logits.cpu().numpy()}, features.encoded, opened.spec)[opened.spec.metric]
