"""A run with its model and its data, for analyses that run it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsebert.data import Collator, Encoded, TaskData, TaskSpec, encode, hold_out, sample
from sparsebert.errors import UserError
from sparsebert.models.storage import load_model
from sparsebert.models.task_model import TaskModel
from sparsebert.reports.analysis.base import Options
from sparsebert.reports.runs import RunRecord
from sparsebert.training.arguments import parse_arguments
from sparsebert.training.config import Config, load_run_task, max_length
from sparsebert.training.hardware import choose_attention, compute_dtype, device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Batch", "OpenRun", "open_run"]

Batch = dict[str, Tensor]


class OpenRun:
    """A run's saved model in fp32 on the device that runs train on, and samples of its data.

    Args:
        run: the run.
        options: where the data are, and how many rows are looked at.
        need_train: whether `train` will be asked for.

    Raises:
        UserError: a damaged model, or data that are not at hand.
    """

    def __init__(self, run: RunRecord, options: Options, *, need_train: bool) -> None:
        self.record = run
        self.options = options
        self.config: Config = parse_arguments(["--config", str(run.files.config)])[0]
        settings = dataclasses.replace(self.config.run, data_dir=options.data_dir or self.config.run.data_dir)
        self.tokenizer: PreTrainedTokenizerBase
        self.model: TaskModel
        self.model, self.tokenizer, self.masks, _ = load_model(run.files.model)
        self.device = device()
        self.model.to(self.device).eval().requires_grad_(False)
        choose_attention(self.model.base, compute_dtype("fp32"))
        self.data: TaskData = load_run_task(settings, require_train=need_train)
        self.spec: TaskSpec = self.data.spec
        self.collator = Collator(self.tokenizer)
        self._label_ids = {name: number for number, name in enumerate(self.model.label_names)}

    def train(self, seed: int = 0) -> Encoded:
        """Rows that it was trained on: a sample, without the slice that the run watched."""
        rows = self.data.train
        if self.config.trainer.get("eval_strategy", "no") != "no":
            rows, _ = hold_out(rows, self.spec)
        return self._encode(sample(rows, self.options.max_samples, seed, "max_samples"), training=True)

    def validation(self, seed: int = 0) -> Encoded:
        """A sample of the rows that it is scored on."""
        rows = sample(self.data.validation, self.options.max_samples, seed, "max_samples")
        return self._encode(rows, training=self.spec.kind == "span")

    def _encode(self, rows: Any, *, training: bool) -> Encoded:
        length = max_length(self.config.run)
        return encode(rows, self.spec, self.tokenizer, length, training=training, label_ids=self._label_ids)

    def batches(self, encoded: Encoded) -> list[tuple[list[int], Batch]]:
        """All items in order of length, in batches on the run's device, each with the items' numbers."""
        size = int(self.config.trainer.get("per_device_eval_batch_size", 64))
        order = sorted(range(len(encoded)), key=lambda index: encoded.lengths[index])
        found = []
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            batch = self.collator([encoded[index] for index in chosen])
            found.append((chosen, {name: tensor.to(self.device) for name, tensor in batch.items()}))
        return found

    @torch.no_grad()
    def put(self, weights: dict[str, Tensor]) -> None:
        """Gives matrices of the base other weights, by module name, in place."""
        for name, weight in weights.items():
            target: Tensor = self.model.base.get_submodule(name).weight  # type: ignore[assignment]
            target.copy_(weight)

    def weights(self) -> dict[str, Tensor]:
        """Copies of the weights of the masked matrices."""
        base = self.model.base
        return {name: base.get_submodule(name).weight.detach().clone() for name in self.masks}  # type: ignore[union-attr,operator]


def open_run(run: RunRecord, options: Options, *, need_train: bool = False) -> OpenRun:
    """As `OpenRun`, with the run named in an error."""
    try:
        return OpenRun(run, options, need_train=need_train)
    except UserError as error:
        raise UserError(f"{run.label}: {error}") from error
