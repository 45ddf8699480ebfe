"""A run: a method's phases on Hugging Face's Trainer, from a configuration to a saved and scored model."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, Trainer, TrainingArguments

from sparsebert.data import Collator, Encoded, TaskData, compute_metrics, demo_model_path, encode, hold_out, label_ids
from sparsebert.data import load_task
from sparsebert.errors import UserError, unknown
from sparsebert.methods import METHODS
from sparsebert.methods.base import Context, Method, Phase
from sparsebert.models.load import base_label_map, load_base, model_fingerprint
from sparsebert.models.prunable import prunable_matrices, sparsity_report
from sparsebert.models.storage import load_model, save_model
from sparsebert.models.task_model import TaskModel
from sparsebert.patterns import parse_pattern
from sparsebert.training import distributed
from sparsebert.training.batches import LengthGrouped
from sparsebert.training.callbacks import (
    CheckpointCallback,
    FiniteLoss,
    InterruptCallback,
    Interrupted,
    LogCallback,
    PhaseCallback,
    ProgressCallback,
)
from sparsebert.training.evaluation import predict, score
from sparsebert.training.folder import RunFolder, guard_disk, last_checkpoint, write_text
from sparsebert.training.hardware import compute_dtype, device, hardware, resolve_precision, versions
from sparsebert.training.settings import RunSettings

__all__ = ["Config", "Run", "evaluate_saved"]

_LONGEST = {"demo": 64, "squad": 384, "squad_v2": 384}


@dataclass
class Config:
    """Everything a run depends on, resolved."""

    run: RunSettings
    method: Any
    """An instance of the method's `Settings`."""
    trainer: dict[str, Any]
    """Hugging Face `TrainingArguments` by name, where they differ from its own defaults."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for config.yaml; paths of this run itself are left out."""
        run = {k: v for k, v in dataclasses.asdict(self.run).items() if k not in ("output", "resume", "config")}
        return {"run": run, "settings": dataclasses.asdict(self.method), "trainer": dict(self.trainer)}


def max_length(run: RunSettings) -> int:
    """The longest input in tokens."""
    return run.max_length or _LONGEST.get(run.task, 128)


def load_run_task(run: RunSettings, data_dir: str | None = None) -> TaskData:
    """The data that a run's settings name."""
    return load_task(
        run.task,
        data_dir or run.data_dir,
        run.text_columns or None,
        run.label_column,
        max_train_samples=run.max_train_samples,
        max_eval_samples=run.max_eval_samples,
    )


class Run:
    """Trains, saves and scores.

    Args:
        config: resolved settings.
        folder: where it goes; made new, or with `resume` an interrupted run's.
        resume: go on from what the folder holds.
    """

    def __init__(self, config: Config, folder: RunFolder, *, resume: bool = False) -> None:
        self.config = config
        self.folder = folder
        self.started = time.monotonic()
        run = config.run
        if run.method not in METHODS:
            raise unknown("method", run.method, METHODS)
        self.precision = resolve_precision(run.precision)
        self.device = device()
        self.seed = int(config.trainer.get("seed", 42))
        self.data = load_run_task(run)
        self._load_model()
        self._encode()
        self.method = self._build_method()
        # What was left open is written down as it was decided, so that the file alone repeats the run.
        config.run = dataclasses.replace(
            run,
            sparsity=self.method.context.sparsity,
            precision=self.precision,
            head=self.model.head_kind,
            max_length=max_length(run),
        )
        self._preparing = time.monotonic() - self.started
        if not resume and distributed.is_main():
            folder.create(config.as_dict())
        distributed.barrier()

    def _load_model(self) -> None:
        run, spec = self.config.run, self.data.spec
        self.model_source = str(demo_model_path()) if run.model == "demo" else run.model
        base, self.tokenizer = load_base(self.model_source)
        self.fingerprint = model_fingerprint(base)
        self.label_ids = label_ids(spec, base_label_map(base)) if spec.kind == "classification" else {}
        names = tuple(sorted(self.label_ids, key=self.label_ids.__getitem__))
        head = run.head or METHODS[run.method].defaults.get("head", "mlp")
        self.model = TaskModel(
            base, spec.kind, spec.num_labels, head=head, pooling=run.pooling, seed=self.seed, label_names=names
        )

    def _encode(self) -> None:
        spec, length = self.data.spec, max_length(self.config.run)
        train = self.data.train
        self.held_out: Encoded | None = None
        if self.config.trainer.get("eval_strategy", "no") != "no":
            # What is watched while training is a slice of train: validation is only for the score at the end.
            train, held_out = hold_out(train, spec)
            self.held_out = encode(
                held_out, spec, self.tokenizer, length, training=spec.kind == "span", label_ids=self.label_ids
            )
        self.train_set = encode(train, spec, self.tokenizer, length, training=True, label_ids=self.label_ids)
        self.collator = Collator(self.tokenizer)

    def _build_method(self) -> Method:
        run = self.config.run
        pattern = parse_pattern(run.pattern)
        context = Context(
            model=self.model,
            matrices=prunable_matrices(self.model.base, run.masked),
            pattern=pattern,
            sparsity=pattern.default_sparsity if run.sparsity is None else run.sparsity,
            allocation=run.allocation,  # type: ignore[arg-type]
            dtype=compute_dtype(self.precision),
            seed=self.seed,
            untouched=run.untouched,
        )
        if "pooler" in run.masked and (self.model.head_kind != "linear" or self.model.kind == "span"):
            raise UserError("masked pooler: this head does not use the pooler; add --head linear, or mask other parts")
        method = METHODS[run.method](context, self.config.method)
        method.module.to(self.device)
        return method

    def execute(self) -> dict[str, Any]:
        """Runs all phases that are not finished yet, saves the model, scores it, writes result.json.

        Raises:
            Interrupted: a signal came; where the run is has been saved.
            UserError: a loss that is not finite, a full disk.
        """
        interrupt = InterruptCallback()
        interrupt.install()
        notes: list[dict[str, Any]] = []
        try:
            with guard_disk(self.folder.root):
                for index, phase in enumerate(self.method.phases()):
                    notes.append(self._run_phase(index, phase, interrupt))
                result = self._finish(notes) if distributed.is_main() else {}
        finally:
            interrupt.remove()
        distributed.barrier()
        return result

    def _run_phase(self, index: int, phase: Phase, interrupt: InterruptCallback) -> dict[str, Any]:
        state, notes_file = self.folder.phase_state(index, phase.name), self.folder.phase_notes(index, phase.name)
        phase.start()
        if notes_file.exists():
            self.method.module.load_state_dict(load_file(state, device=str(self.device)))
            phase.loaded()
            return json.loads(notes_file.read_text(encoding="utf-8"))
        begun = time.monotonic()
        steps = self._train(index, phase, interrupt)
        phase.finish()
        phase.loaded()
        notes: dict[str, Any] = {"phase": phase.name, "steps": steps, "train_seconds": time.monotonic() - begun}
        if phase.report is not None and distributed.is_main():
            notes["report"] = phase.report
            notes["metrics"] = self._score(self.method.module.model)
        notes["seconds"] = time.monotonic() - begun
        if distributed.is_main():
            temporary = state.with_suffix(".tmp")
            save_file(self.method.module.state_dict(), temporary)
            temporary.replace(state)
            write_text(notes_file, json.dumps(notes))
        distributed.barrier()
        return notes

    def _train(self, index: int, phase: Phase, interrupt: InterruptCallback) -> int:
        checkpoints = self.folder.phase_folder(index, phase.name)
        checkpoint = last_checkpoint(checkpoints) if distributed.is_main() else None
        checkpoint = distributed.share(checkpoint)
        arguments = self._arguments(phase, checkpoints)
        progress = ProgressCallback(phase.name)
        trainer = self._trainer(phase, arguments, [interrupt, progress])
        if checkpoint is not None and distributed.is_main():
            self.folder.truncate_metrics(phase.name, int(checkpoint.name.removeprefix("checkpoint-")))
        hook = self.method.module.register_forward_hook(FiniteLoss(phase.name))
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            progress.close()
            hook.remove()
        if interrupt.stopped_at is not None:
            raise Interrupted(interrupt.received, interrupt.stopped_at)
        return int(trainer.state.global_step)

    def _arguments(self, phase: Phase, checkpoints: Path) -> TrainingArguments:
        given = {**self.config.trainer, **phase.training()}
        given.setdefault("train_sampling_strategy", "sequential")
        if given.get("save_total_limit") is not None:
            given["save_total_limit"] = max(2, given["save_total_limit"])  # the last good one outlives the next save
        fixed = {
            "output_dir": str(checkpoints),
            "bf16": self.precision == "bf16",
            "fp16": self.precision == "fp16",
            "use_cpu": self.device.type == "cpu",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "logging_nan_inf_filter": False,
            "dataloader_pin_memory": self.device.type == "cuda",
            "ddp_find_unused_parameters": False,
            "ddp_broadcast_buffers": False,
            "label_names": ["start_positions", "end_positions"] if self.model.kind == "span" else ["labels"],
        }
        try:
            return TrainingArguments(**{**given, **fixed})
        except (ValueError, TypeError, ImportError) as error:
            raise UserError(f"training arguments: {error}") from error

    def _trainer(self, phase: Phase, arguments: TrainingArguments, callbacks: list[Any]) -> Trainer:
        cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        groups = phase.parameter_groups(arguments.learning_rate)
        for group in groups:
            group.setdefault("weight_decay", arguments.weight_decay)
        options.pop("lr", None)
        optimizer = cls([group for group in groups if group["params"]], lr=arguments.learning_rate, **options)
        train: Any = self.train_set
        if arguments.train_sampling_strategy == "sequential":
            ranks = distributed.world_size()
            train = LengthGrouped(self.train_set, arguments.per_device_train_batch_size * ranks, self.seed)
        spec = self.data.spec
        trainer = Trainer(
            model=self.method.module,
            args=arguments,
            data_collator=self.collator,
            train_dataset=train,
            eval_dataset=self.held_out,
            compute_metrics=None
            if spec.kind == "span"
            else lambda given: compute_metrics(spec, given.predictions, given.label_ids),
            optimizers=(optimizer, None),
            callbacks=[PhaseCallback(phase), *callbacks, CheckpointCallback()],
        )
        trainer.remove_callback(PrinterCallback)
        # First in line, so that TensorBoard and W&B see the method's numbers too.
        trainer.callback_handler.callbacks.insert(0, LogCallback(self.folder, phase))
        return trainer

    def _score(self, model: TaskModel) -> dict[str, float]:
        encoded = encode_validation(self.data, self.tokenizer, self.config.run, self.label_ids)
        return score_sets(model, encoded, self.data, self.tokenizer, self.config, self.precision)

    def _finish(self, notes: list[dict[str, Any]]) -> dict[str, Any]:
        begun = time.monotonic()
        run, data = self.config.run, self.data
        masks = {name: mask.cpu() for name, mask in self.method.finish().items()}
        report = sparsity_report(self.model.base, masks)
        info = {"method": run.method, "task": data.spec.name, "base_model": run.model, "base_sha256": self.fingerprint}
        self.model.zero_grad(set_to_none=True)
        save_model(self.folder.model, self.model, self.tokenizer, masks=masks, pattern=run.pattern, info=info)
        # The score is the saved files' own: what `sparsebert.evaluate` will read.
        metrics = evaluate_saved(self.folder, self.config, data)
        result = {
            "method": run.method,
            "task": data.spec.name,
            "pattern": run.pattern if self.method.sparsifies else None,
            "metric": data.spec.metric,
            "score": metrics[data.spec.metric],
            "metrics": metrics,
            **{note["report"]: note["metrics"] for note in notes if "report" in note},
            "sparsity": {**report, "target": run.sparsity if self.method.sparsifies else 0.0},
            "seed": self.seed,
            "seconds": round(sum(n["seconds"] for n in notes) + self._preparing + time.monotonic() - begun, 1),
            "phases": [{k: note[k] for k in ("phase", "steps", "train_seconds")} for note in notes],
            "precision": self.precision,
            "model": {"source": run.model, "sha256": self.fingerprint},
            "data": {"rows": {"train": len(data.train), "validation": len(data.validation)}, **data.fingerprint},
            "note": data.note,
            "versions": versions(),
            "hardware": hardware(),
        }
        write_text(self.folder.result, json.dumps(result, indent=2) + "\n")
        self.folder.clear()
        return result


def encode_validation(data: TaskData, tokenizer: Any, run: RunSettings, ids: dict[str, int]) -> dict[str, Encoded]:
    """The validation sets, encoded: the main one under "", others under their names."""
    sets = {"": data.validation, **data.extra_validation}
    return {
        name: encode(dataset, data.spec, tokenizer, max_length(run), training=False, label_ids=ids)
        for name, dataset in sets.items()
    }


def score_sets(
    model: TaskModel, sets: dict[str, Encoded], data: TaskData, tokenizer: Any, config: Config, precision: str
) -> dict[str, float]:
    """Metrics of a model on every validation set; those of further sets end in their name."""
    metrics: dict[str, float] = {}
    where = device()
    model.to(where)
    for name, encoded in sets.items():
        outputs = predict(
            model,
            encoded,
            Collator(tokenizer),
            batch_size=int(config.trainer.get("per_device_eval_batch_size", 64)),
            dtype=compute_dtype(precision),
            device=where,
        )
        metrics |= {key + (f"_{name}" if name else ""): value for key, value in score(outputs, encoded, data.spec).items()}
    return metrics


def evaluate_saved(folder: RunFolder, config: Config, data: TaskData | None = None) -> dict[str, float]:
    """Loads a run's saved model and scores it on its task's validation set, in the run's precision."""
    model, tokenizer, _, _ = load_model(folder.model)
    data = data or load_run_task(config.run)
    ids = {name: index for index, name in enumerate(model.label_names)}
    encoded = encode_validation(data, tokenizer, config.run, ids)
    return score_sets(model, encoded, data, tokenizer, config, resolve_precision(config.run.precision))
