"""Scores of a model on a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from sparsebert.data import Collator, Encoded, TaskSpec, compute_metrics, span_metrics
from sparsebert.errors import UserError
from sparsebert.models.task_model import TaskModel

__all__ = ["predict", "score"]


@torch.no_grad()
def predict(
    model: TaskModel,
    encoded: Encoded,
    collator: Collator,
    *,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, np.ndarray]:
    """All outputs of a model, in the order of the examples.

    Examples go through in order of length, so that batches hold little padding. Batches, and with them every bit of
    the result, depend on the data and `batch_size` alone.

    Args:
        model: moved to `device` before.
        encoded: the examples.
        collator: makes batches.
        batch_size: examples of one forward pass.
        dtype: of the computation.
        device: where it runs.
        progress: called after every batch with the number of examples done, and of all.

    Raises:
        UserError: an output that is not finite.

    Returns:
        fp32 arrays by name: `logits` `[examples, ...]`, or `start_logits` and `end_logits` as object arrays of rows.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(encoded)), key=lambda index: encoded.lengths[index])
    rows: dict[str, list[Any]] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = {key: value.to(device) for key, value in collator([encoded[index] for index in chosen]).items()}
        for key in ("labels", "start_positions", "end_positions"):
            batch.pop(key, None)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            outputs = model(**batch)
        for key, value in outputs.items():
            if not bool(torch.isfinite(value).all()):
                raise UserError(
                    f"scoring: the model's {key} are not finite numbers; it did not survive its training: "
                    "try a lower --learning-rate or --precision fp32"
                )
            values = rows.setdefault(key, [None] * len(order))
            for index, row in zip(chosen, value.float().cpu().numpy(), strict=True):
                values[index] = row
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))
    model.train(was_training)
    if "logits" in rows:
        return {"logits": np.stack(rows["logits"])}
    return {key: np.array(values, dtype=object) for key, values in rows.items()}


def score(outputs: Mapping[str, np.ndarray], encoded: Encoded, spec: TaskSpec) -> dict[str, float]:
    """The task's metrics, as fractions, from what `predict` returns."""
    if spec.kind == "span":
        return span_metrics(encoded, outputs["start_logits"], outputs["end_logits"], spec)
    return compute_metrics(spec, outputs["logits"], encoded.labels, encoded.label_ids)
