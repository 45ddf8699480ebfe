"""Scores of a model on its task's validation sets: at the end of a run, and of a saved one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsebert.data import Collator, Encoded, TaskData, encode
from sparsebert.models.storage import load_model
from sparsebert.models.task_model import TaskModel
from sparsebert.training.config import Config, load_run_task, max_length
from sparsebert.training.evaluation import predict, score
from sparsebert.training.folder import RunFolder
from sparsebert.training.hardware import choose_attention, compute_dtype, device, resolve_precision
from sparsebert.training.progress import Bar
from sparsebert.training.settings import RunSettings

__all__ = ["encode_validation", "evaluate_saved", "score_sets"]


def encode_validation(data: TaskData, tokenizer: Any, run: RunSettings, ids: dict[str, int]) -> dict[str, Encoded]:
    """The validation sets, encoded: the main one under "", others under their names."""
    sets = {"": data.validation, **data.extra_validation}
    return {
        name: encode(dataset, data.spec, tokenizer, max_length(run), training=False, label_ids=ids)
        for name, dataset in sets.items()
    }


def score_sets(
    model: TaskModel,
    sets: dict[str, Encoded],
    data: TaskData,
    tokenizer: Any,
    config: Config,
    precision: str,
    check: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Metrics of a model on every validation set; those of further sets end in their name.

    Args:
        check: called between batches; may raise to stop.
    """
    metrics: dict[str, float] = {}
    where = device()
    model.to(where)
    for name, encoded in sets.items():
        bar = Bar(f"scoring {name}".rstrip(), len(encoded))

        def progress(done: int, total: int, bar: Bar = bar) -> None:
            bar.update(done)
            if check is not None:
                check()

        try:
            outputs = predict(
                model,
                encoded,
                Collator(tokenizer),
                batch_size=int(config.trainer.get("per_device_eval_batch_size", 64)),
                dtype=compute_dtype(precision),
                device=where,
                progress=progress,
            )
        finally:
            bar.close()
        found = score(outputs, encoded, data.spec)
        metrics |= {key + (f"_{name}" if name else ""): value for key, value in found.items()}
    return metrics


def evaluate_saved(
    folder: RunFolder, config: Config, data: TaskData | None = None, check: Callable[[], None] | None = None
) -> dict[str, float]:
    """Loads a run's saved model and scores it on its task's validation set, in the run's precision.

    Args:
        folder: the run's.
        config: the run's, perhaps with another place of the data.
        data: the task, if it is at hand.
        check: as for `score_sets`.

    Raises:
        UserError: a missing, damaged or altered part of the model or the data.
    """
    model, tokenizer, _, _ = load_model(folder.model)
    data = data or load_run_task(config.run, require_train=False)
    precision = resolve_precision(config.run.precision)
    choose_attention(model.base, compute_dtype(precision))
    ids = {name: index for index, name in enumerate(model.label_names)}
    encoded = encode_validation(data, tokenizer, config.run, ids)
    return score_sets(model, encoded, data, tokenizer, config, precision, check)
