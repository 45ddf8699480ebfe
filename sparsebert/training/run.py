"""A run: a method's phases on Hugging Face's Trainer, from a configuration to a saved and scored model."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from sparsebert.data import Collator, Encoded, TaskData, demo_model_path, encode, hold_out, label_ids, sample
from sparsebert.data.text import MaskedText, PackedText, load_text, pack_text
from sparsebert.errors import UserError, unknown
from sparsebert.methods import METHODS
from sparsebert.methods.base import Context, Method, Phase
from sparsebert.models.load import base_label_map, load_base, max_tokens, model_fingerprint
from sparsebert.models.prunable import prunable_matrices, sparsity_report
from sparsebert.models.storage import save_model
from sparsebert.models.task_model import TaskModel
from sparsebert.patterns import parse_pattern
from sparsebert.training import distributed
from sparsebert.training.callbacks import CheckpointCallback, LogCallback, PhaseCallback, TrainSliceCallback
from sparsebert.training.config import Config, load_run_task, max_length
from sparsebert.training.disk import guard_disk
from sparsebert.training.folder import Checkpoint, RunFolder, last_checkpoint, put_in_place, write_text
from sparsebert.training.hardware import choose_attention, compute_dtype, device, hardware, resolve_precision, versions
from sparsebert.training.interrupt import InterruptCallback, Interrupted
from sparsebert.training.loss import LossCallback, check_weights
from sparsebert.training.progress import ProgressCallback
from sparsebert.training.scoring import encode_validation, evaluate_saved, score_sets
from sparsebert.training.teacher import Teacher
from sparsebert.training.trainer import build_optimizer, build_trainer, freeze_unused, training_arguments

__all__ = ["Config", "Run", "evaluate_saved"]


class Run:
    """Trains, saves and scores.

    Args:
        config: resolved settings.
        folder: where it goes; made new, or with `resume` an interrupted run's.
        resume: go on from what the folder holds.
        data: the task, if it is at hand.

    Raises:
        UserError: anything wrong with settings, model, data or folder; nothing has been written then.
    """

    def __init__(
        self, config: Config, folder: RunFolder, *, resume: bool = False, data: TaskData | None = None
    ) -> None:
        self.config = config
        self.folder = folder
        self.started = time.monotonic()
        run = config.run
        if run.method not in METHODS:
            raise unknown("method", run.method, METHODS)
        config.check()
        if not resume:
            distributed.once(folder.check_free)
        self.precision = resolve_precision(run.precision)
        self.device = device()
        self.seed = int(config.trainer.get("seed", 42))
        self.data = data or load_run_task(run)
        self._load_model()
        self._encode()
        self.teacher: Teacher | None = None
        if METHODS[run.method].wants_teacher(config.method):
            # With the length as it was decided: a resumed run, which has it so, must find the same teacher.
            same = Config(dataclasses.replace(run, max_length=self.length), config.method, config.trainer)
            self.teacher = Teacher(same, self.data, self.precision, self.model, self.tokenizer)
        self.method = self._build_method()
        self.phases = self.method.phases()
        self._pack_text()
        for index, phase in enumerate(self.phases):
            self._arguments(index, phase)
        # What was left open is written down as it was decided, so that the file alone repeats the run.
        config.run = dataclasses.replace(
            run,
            sparsity=self.method.context.sparsity if self.method.sparsifies else None,
            precision=self.precision,
            head=self.model.head_kind,
            max_length=self.length,
        )
        self._preparing = time.monotonic() - self.started
        text = {"text": self.text.fingerprint} if self.text else {}
        inputs = {**text, "model": self.fingerprint, "data": self.data.fingerprint, "ranks": distributed.world_size()}
        distributed.once(lambda: folder.check_inputs(inputs) if resume else folder.create(config.as_dict(), inputs))

    def _load_model(self) -> None:
        run, spec = self.config.run, self.data.spec
        self.model_source = str(demo_model_path()) if run.model == "demo" else run.model
        base, self.tokenizer = load_base(self.model_source)
        # Calls leave their truncation in a fast tokenizer; what is saved must not depend on which call was the last.
        self._first_tokenizer = copy.deepcopy(self.tokenizer)
        choose_attention(base, compute_dtype(self.precision))
        self.fingerprint = model_fingerprint(base)
        METHODS[run.method].shape(base, self.config.method)
        self.label_ids = label_ids(spec, base_label_map(base)) if spec.kind == "classification" else {}
        names = tuple(sorted(self.label_ids, key=self.label_ids.__getitem__))
        head = run.head or METHODS[run.method].defaults.get("head", "mlp")
        self.model = TaskModel(
            base, spec.kind, spec.num_labels, head=head, pooling=run.pooling, seed=self.seed, label_names=names
        )
        longest = max_tokens(base)
        if run.max_length is not None and run.max_length > longest:
            raise UserError(f"max_length: the model takes at most {longest} tokens, got {run.max_length}")
        self.length = min(max_length(run), longest)

    def _encode(self) -> None:
        spec, train = self.data.spec, self.data.train
        self.held_out: Encoded | None = None
        self.watched: dict[str, Any] = {}
        """What is watched while training, before it is encoded."""
        best = self.config.trainer.get("metric_for_best_model")
        watched = ["loss", *(() if spec.kind == "span" else spec.metrics)]
        if best is not None and best.removeprefix("eval_") not in watched:
            raise unknown("metric_for_best_model", best, watched)
        if self.config.trainer.get("eval_strategy", "no") != "no":
            # What is watched while training is a slice of train: validation is only for the score at the end.
            train, held_out = hold_out(train, spec)
            self.held_out = self._encoded(held_out, training=spec.kind == "span")
            self.watched["held_out"] = held_out
            if self.config.run.watch_train:
                self.watched["train"] = sample(train, len(held_out), 0, "watch_train")
        self.train_set = self._encoded(train, training=True)
        self.collator = Collator(self.tokenizer)

    def _encoded(self, dataset: Any, *, training: bool) -> Encoded:
        return encode(dataset, self.data.spec, self.tokenizer, self.length, training=training, label_ids=self.label_ids)

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
            teacher=self.teacher.model if self.teacher else None,
            source=self.model_source,
            tokenizer=self.tokenizer,
            sparsity_asked=run.sparsity is not None,
        )
        if "pooler" in run.masked and (self.model.head_kind != "linear" or self.model.kind == "span"):
            raise UserError("masked pooler: this head does not use the pooler; add --head linear, or mask other parts")
        method = METHODS[run.method](context, self.config.method)
        method.module.to(self.device)
        if self.teacher is not None:
            self.teacher.model.to(self.device)
            choose_attention(self.teacher.model.base, context.dtype)
        return method

    def _pack_text(self) -> None:
        """Reads and packs `--text` where a phase trains on it."""
        self.text: PackedText | None = None
        wanted = [phase.name for phase in self.phases if phase.data == "text"]
        run = self.config.run
        if not wanted:
            if run.text:
                raise UserError(f"text: method {run.method} with these settings does not train on text; leave it out")
            return
        if not run.text:
            raise UserError(
                f"text: phase {wanted[0]} of method {run.method} trains on text; give --text FILE or FOLDER"
            )
        longest = max_tokens(self.model.base)
        if run.text_length is not None and run.text_length > longest:
            raise UserError(f"text_length: the model takes at most {longest} tokens, got {run.text_length}")
        self.text = pack_text(load_text(run.text), self.tokenizer, run.text_length or min(512, longest))

    def _examples(self, phase: Phase) -> tuple[Any, Any]:
        """What a phase trains on, and what is held out of it, if anything."""
        if phase.data == "task" or self.text is None:
            return self.train_set, self.held_out
        given = self.config.trainer.get("data_seed")
        seed = self.seed if given is None else int(given)
        train, held_out = self.text.parts()
        return (
            MaskedText(train, self.tokenizer, seed, phase.masking),
            MaskedText(held_out, self.tokenizer, seed, phase.masking),
        )

    def execute(self) -> dict[str, Any]:
        """Runs all phases that are not finished yet, saves the model, scores it, writes result.json.

        Returns:
            What result.json holds, on the main rank; nothing on the others.

        Raises:
            Interrupted: a signal came; where the run is has been saved.
            UserError: a loss that is not finite, a full disk.
        """
        interrupt = InterruptCallback()
        interrupt.install()
        notes: list[dict[str, Any]] = []
        try:
            with guard_disk(self.folder.root):
                teacher = self.teacher.fit() if self.teacher else None
                for index, phase in enumerate(self.phases):
                    notes.append(self._run_phase(index, phase, interrupt))
                result = self._finish(notes, teacher, interrupt) if distributed.is_main() else {}
        finally:
            interrupt.remove()
        distributed.barrier()
        return result

    def _run_phase(self, index: int, phase: Phase, interrupt: InterruptCallback) -> dict[str, Any]:
        module, state = self.method.module, self.folder.phase_state(index, phase.name)
        notes = distributed.share(self.folder.phase_notes(index, phase.name))
        phase.start()
        if notes:
            module.load_state_dict(load_file(state, device=str(self.device)))
            phase.loaded()
        else:
            interrupt.check(f"before phase {phase.name}")
            notes = self._train(index, phase, interrupt)
            phase.finish()
            phase.loaded()
            notes["outcome"] = phase.outcome(self._examples(phase)[1] if phase.data == "text" else None)
            if distributed.is_main():
                temporary = state.with_suffix(".tmp")
                save_file(module.state_dict(), temporary)
                put_in_place(temporary, state)
                self.folder.write_notes(index, phase.name, notes)
                self.folder.drop_checkpoints(index, phase.name)
        if phase.report is not None and distributed.is_main() and "metrics" not in notes:
            begun = time.monotonic()
            encoded = encode_validation(self.data, self.tokenizer, self.config.run, self.label_ids)
            metrics = score_sets(
                module.model, encoded, self.data, self.tokenizer, self.config, self.precision,
                lambda: interrupt.check_alone(f"while scoring phase {phase.name}"),
            )  # fmt: skip
            notes |= {"report": phase.report, "metrics": metrics, "score_seconds": time.monotonic() - begun}
            self.folder.write_notes(index, phase.name, notes)
        distributed.barrier()
        return notes

    def _train(self, index: int, phase: Phase, interrupt: InterruptCallback) -> dict[str, Any]:
        """Trains a started phase from its newest checkpoint, if there is one, to its end; returns its notes."""
        folder, module = self.folder.phase_folder(index, phase.name), self.method.module
        arguments = self._arguments(index, phase)
        if phase.note and distributed.is_main():
            print(f"{phase.name}  {phase.note}", flush=True)
        freeze_unused(self.model)
        optimizer = build_optimizer(phase, arguments)
        checkpoint = distributed.once(lambda: self._resume_point(folder, phase))
        saved = checkpoint.read() if checkpoint is not None else None
        losses, turns, progress = LossCallback(phase.name), PhaseCallback(phase), ProgressCallback(phase.name)
        saves = CheckpointCallback(turns, losses, saved["seconds"] if saved else 0.0)
        if saved is not None:
            losses.restore(saved["losses"][distributed.rank()])
            arguments.eval_on_start = False
        if checkpoint is not None and saved is not None and saved["ended"]:
            # Trainer would take one step more.
            weights = checkpoint.best() if arguments.load_best_model_at_end else checkpoint.weights
            module.load_state_dict(load_file(weights, device=str(self.device)))
            steps = checkpoint.step
        else:
            train, held_out = self._examples(phase)
            trainer = build_trainer(
                phase, arguments, optimizer,
                train=train, held_out=held_out, collator=self.collator, spec=self.data.spec,
                reports=self.folder.reports, first=[losses, LogCallback(self.folder, phase)],
                callbacks=[turns, interrupt, progress, saves],
            )  # fmt: skip
            self._watch_train(trainer, phase)
            hook = losses.watch(module)
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
            finally:
                progress.close()
                hook.remove()
            steps = int(trainer.state.global_step)
            if interrupt.stopped_at is not None:
                raise Interrupted(interrupt.received, f"after step {steps} of phase {phase.name}")
        check_weights(phase.name, module.model, steps)
        loss = losses.mean()
        if distributed.is_main():
            self.folder.phase_summary(phase.name, steps, loss, saves.seconds)
        return {"phase": phase.name, "steps": steps, "train_loss": loss, "train_seconds": saves.seconds}

    def _watch_train(self, trainer: Trainer, phase: Phase) -> None:
        """Has a slice of train evaluated too, for a phase on the task's examples."""
        if "train" in self.watched and phase.data == "task":
            rows = self._encoded(self.watched["train"], training=self.data.spec.kind == "span")
            trainer.add_callback(TrainSliceCallback(trainer, rows))

    def _resume_point(self, folder: Path, phase: Phase) -> Checkpoint | None:
        checkpoint = last_checkpoint(folder)
        self.folder.truncate_metrics(phase.name, checkpoint.step if checkpoint is not None else -1)
        return checkpoint

    def _arguments(self, index: int, phase: Phase) -> TrainingArguments:
        return training_arguments(
            {**self.config.trainer, **phase.training()},
            self.folder.phase_folder(index, phase.name),
            precision=self.precision,
            device=self.device,
            kind=self.model.kind,
        )

    def _finish(
        self, notes: list[dict[str, Any]], teacher: dict[str, Any] | None, interrupt: InterruptCallback
    ) -> dict[str, Any]:
        begun = time.monotonic()
        run, data = self.config.run, self.data
        recovery = {"recovery": self.method.masks.recovery()} if self.method.sparsifies else {}
        masks = {name: mask.cpu() for name, mask in self.method.finish().items()}
        report = sparsity_report(self.model.base, masks)
        info = {"method": run.method, "task": data.spec.name, "base_model": run.model, "base_sha256": self.fingerprint}
        self.model.zero_grad(set_to_none=True)
        save_model(self.folder.model, self.model, self._first_tokenizer, masks=masks, pattern=run.pattern, info=info)
        # The score is the saved files' own: what `sparsebert.evaluate` will read.
        metrics = evaluate_saved(
            self.folder, self.config, data, lambda: interrupt.check_alone("while scoring; training is finished")
        )
        watched = score_sets(
            self.model, {name: self._encoded(rows, training=False) for name, rows in self.watched.items()}, data,
            self.tokenizer, self.config, self.precision,
            lambda: interrupt.check_alone("while scoring; training is finished"),
        )  # fmt: skip
        sparsifies = self.method.sparsifies
        spent = sum(note["train_seconds"] + note.get("score_seconds", 0.0) for note in notes)
        result = {
            "method": run.method,
            "task": data.spec.name,
            "pattern": run.pattern if sparsifies else None,
            "metric": data.spec.metric,
            "score": metrics[data.spec.metric],
            "metrics": metrics,
            **{f"{name}_score": watched[f"{data.spec.metric}_{name}"] for name in self.watched},
            **{note["report"]: note["metrics"] for note in notes if "report" in note},
            "sparsity": {**report, "target": run.sparsity if sparsifies else 0.0},
            **recovery,
            "seed": self.seed,
            "seconds": round(spent + self._preparing + time.monotonic() - begun, 1),
            "phases": [
                {k: note[k] for k in ("phase", "steps", "train_loss", "train_seconds")} | note.get("outcome", {})
                for note in notes
            ],
            **({"teacher": teacher} if teacher else {}),
            **({"text": self.text.fingerprint} if self.text else {}),
            "precision": self.precision,
            "ranks": distributed.world_size(),
            "model": {"source": run.model, "sha256": self.fingerprint},
            "data": data.fingerprint,
            "note": data.note,
            "versions": versions(),
            "hardware": hardware(),
        }
        write_text(self.folder.result, json.dumps(result, indent=2) + "\n")
        self.folder.clear()
        return result
