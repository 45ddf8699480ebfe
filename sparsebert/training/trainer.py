"""One phase as Hugging Face's Trainer takes it: its arguments, optimiser, data order and callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, get_scheduler
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from sparsebert.data import Collator, Encoded, TaskSpec, compute_metrics
from sparsebert.errors import UserError
from sparsebert.methods.base import Phase
from sparsebert.models.task_model import TaskModel
from sparsebert.training import distributed
from sparsebert.training.batches import LengthGrouped

__all__ = ["OWNED", "REFUSED", "build_optimizer", "build_trainer", "freeze_unused", "training_arguments"]

OWNED: dict[str, str] = {
    "output_dir": "use --output",
    "bf16": "use --precision",
    "fp16": "use --precision",
    "resume_from_checkpoint": "use --resume",
    **dict.fromkeys(
        ("use_cpu", "disable_tqdm", "remove_unused_columns", "label_names", "do_train", "do_eval", "do_predict",
         "logging_nan_inf_filter", "ddp_broadcast_buffers", "ddp_find_unused_parameters", "dataloader_pin_memory"),
        "",
    ),
}  # fmt: skip
"""Trainer's arguments that the run decides, and what to give instead."""

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("save_only_model", "ignore_data_skip", "dataloader_persistent_workers", "enable_jit_checkpoint",
         "restore_callback_states_from_checkpoint"),
        "a resumed run would not be the same to the last bit",
    ),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), "an evaluation would round the weights that are trained"),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "parallelism_config", "gradient_checkpointing", "use_liger_kernel",
         "gradient_checkpointing_kwargs", "activation_checkpointing", "activation_checkpointing_kwargs",
         "liger_kernel_config", "neftune_noise_alpha"),
        "needs a model of transformers' own, and a run trains one with masks around it",
    ),
    "auto_find_batch_size": "every batch size is another run; choose --per-device-train-batch-size",
    "label_smoothing_factor": "the loss is the task's own",
    "push_to_hub": "a run stays on this machine; upload its folder model/ when it is finished",
    **dict.fromkeys(("batch_eval_metrics", "include_for_metrics", "eval_use_gather_object"), "metrics are the task's"),
}  # fmt: skip
"""Trainer's arguments that would break what a run promises, and why."""


def training_arguments(
    given: Mapping[str, Any], checkpoints: Path, *, precision: str, device: torch.device, kind: str
) -> TrainingArguments:
    """Trainer's arguments for one phase.

    Args:
        given: what method, phase and user chose, by name.
        checkpoints: folder for the phase's checkpoints.
        precision: `fp32`, `bf16` or `fp16`.
        device: where it trains.
        kind: of the task.

    Raises:
        UserError: what `TrainingArguments` refuses, or a sampling strategy that cannot be resumed.
    """
    values = dict(given)
    order = values.setdefault("train_sampling_strategy", "sequential")
    if order not in ("sequential", "random"):
        raise UserError(
            f"train_sampling_strategy {order!r}: expected 'sequential' (shuffled anew every epoch, batches of like "
            "length: the default) or 'random'"
        )
    if values.get("save_total_limit") is not None:
        # The last good one outlives the next save, also beside the best one.
        values["save_total_limit"] = max(3 if values.get("load_best_model_at_end") else 2, values["save_total_limit"])
    fixed = {
        "output_dir": str(checkpoints),
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": device.type == "cpu",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": device.type == "cuda",
        "ddp_find_unused_parameters": values.get("ddp_find_unused_parameters", False),
        "ddp_broadcast_buffers": False,
        "label_names": ["start_positions", "end_positions"] if kind == "span" else ["labels"],
    }
    try:
        arguments = TrainingArguments(**{**values, **fixed})
    except (ValueError, TypeError, ImportError, RuntimeError, OSError) as error:
        raise UserError(f"training arguments: {_one_line(error)}") from error
    _check_words(arguments)
    # Several GPUs without torchrun: one is used, where Trainer would take torch's old DataParallel.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def build_optimizer(phase: Phase, arguments: TrainingArguments) -> torch.optim.Optimizer:
    """The optimiser over a started phase's parameter groups.

    Raises:
        UserError: options that the optimiser does not take.
    """
    groups = phase.parameter_groups(arguments.learning_rate)
    for group in groups:
        group.setdefault("weight_decay", arguments.weight_decay)
    try:
        cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        options.pop("lr", None)
        return cls([group for group in groups if group["params"]], lr=arguments.learning_rate, **options)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise UserError(f"optim {_word(arguments.optim)}: {_one_line(error)}") from error


def _check_words(arguments: TrainingArguments) -> None:
    """Tries what Trainer would only look up when training begins: optimiser, schedule, where it reports to."""
    try:
        name = f"optim {_word(arguments.optim)}"
        Trainer.get_optimizer_cls_and_kwargs(arguments)
        name = f"lr_scheduler_type {_word(arguments.lr_scheduler_type)}"
        options: Any = arguments.lr_scheduler_kwargs
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0),
            num_warmup_steps=0,
            num_training_steps=10,
            scheduler_specific_kwargs=options,
        )
        name = f"report_to {arguments.report_to}"
        for reporter in get_reporting_integration_callbacks(arguments.report_to):
            reporter()
        if arguments.torch_compile:
            name = f"torch_compile_backend {arguments.torch_compile_backend}, mode {arguments.torch_compile_mode}"
            backend = arguments.torch_compile_backend or "inductor"
            torch.compile(torch.nn.Identity(), backend=backend, mode=arguments.torch_compile_mode)
    except (ValueError, TypeError, ImportError, RuntimeError, AttributeError) as error:
        raise UserError(f"{name}: {_one_line(error)}") from error


def freeze_unused(model: TaskModel) -> None:
    """Takes the pooler out of training where the head does not look at it; DDP would wait for its gradient."""
    pooler = getattr(model.base, "pooler", None)
    if pooler is not None and (model.head_kind != "linear" or model.kind == "span" or model.pooling != "cls"):
        pooler.requires_grad_(False)


def build_trainer(
    phase: Phase,
    arguments: TrainingArguments,
    optimizer: torch.optim.Optimizer,
    *,
    train: Any,
    held_out: Any,
    collator: Collator,
    spec: TaskSpec,
    reports: Path,
    callbacks: list[TrainerCallback],
    first: list[TrainerCallback],
) -> Trainer:
    """A Trainer for one phase.

    Args:
        phase: started.
        arguments: from `training_arguments`.
        optimizer: from `build_optimizer`.
        train: the examples to train on: `Encoded`, or a dataset with an order of its own.
        held_out: the examples to watch, if any.
        collator: makes batches.
        spec: the task, for the metrics of what is watched.
        reports: folder for TensorBoard's files.
        callbacks: come after Trainer's own.
        first: come before them, so that TensorBoard and W&B see what these write into a log line.

    Raises:
        UserError: what Trainer refuses.
    """

    def metrics(given: Any) -> dict[str, float]:
        return compute_metrics(spec, given.predictions, given.label_ids, train.label_ids)

    data: Any = train
    if isinstance(train, Encoded) and arguments.train_sampling_strategy == "sequential":
        batch = arguments.per_device_train_batch_size * distributed.world_size()
        data = LengthGrouped(train, batch, arguments.seed if arguments.data_seed is None else arguments.data_seed)
    try:
        trainer = Trainer(
            model=phase.module,
            args=arguments,
            data_collator=collator,
            train_dataset=data,
            eval_dataset=held_out,
            compute_metrics=metrics if isinstance(train, Encoded) and spec.kind != "span" else None,
            optimizers=(optimizer, None),
            callbacks=callbacks,
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"training arguments: {_one_line(error)}") from error
    trainer.remove_callback(PrinterCallback)
    trainer.callback_handler.callbacks[:0] = first
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            # Its default lies among the checkpoints, which go when the run is finished.
            callback.logging_dir = str(reports / phase.name)
    return trainer


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
