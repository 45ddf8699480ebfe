"""The teacher of a distilling run: a fine-tuned dense model, given, or trained once and kept by its configuration."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sparsebert._load import cache_dir
from sparsebert.data import TaskData, demo_model_path
from sparsebert.errors import UserError
from sparsebert.methods import METHODS
from sparsebert.models.load import load_base, model_fingerprint
from sparsebert.models.storage import load_model
from sparsebert.models.task_model import TaskModel
from sparsebert.training import distributed
from sparsebert.training.config import Config
from sparsebert.training.folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Teacher"]

_METHOD = "finetune"


class Teacher:
    """A run's teacher. `model` has the right shape at once, and its weights after `fit`.

    Args:
        config: the student's configuration; `teacher`, `teacher_model` and the other `teacher_...` settings count.
        data: the student's task.
        precision: resolved.
        student: what is distilled into, before it learns: the teacher must have its kind of task and its labels.
        tokenizer: the student's; the teacher's must have the same vocabulary.

    Raises:
        UserError: a teacher that is no finished run, is of another task, labels or vocabulary, or has been pruned.
    """

    def __init__(
        self,
        config: Config,
        data: TaskData,
        precision: str,
        student: TaskModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        run = config.run
        self.data = data
        self.given = run.teacher is not None
        if run.teacher is not None:
            root = Path(run.teacher).expanduser()
            if not (root / "model").is_dir():
                raise UserError(f"teacher {root}: expected the folder of a finished run (it has no folder model)")
            self.folder = RunFolder(root)
            self.model, vocabulary, masks, _ = load_model(self.folder.model)
            if masks:
                raise UserError(f"teacher {root}: its weights are pruned; give a dense run, as --method finetune makes")
        else:
            self.config = _config(config, data, precision)
            self.model, vocabulary = _untrained(self.config, student)
            self.folder = RunFolder(_kept_folder(self.config, data, self.model))
        _check_fit(self.model, student, vocabulary, tokenizer, str(run.teacher or self.config.run.model))

    def fit(self) -> dict[str, Any]:
        """Trains the teacher, unless that was done before, and puts its weights in place.

        Returns:
            For the result: where the teacher is from and its score.

        Raises:
            Interrupted, UserError: as a run does; what was trained of the teacher is kept, and gone on with.
        """
        if not self.given:
            with _alone(self.folder.root):
                if not distributed.share(self.folder.result.is_file()):
                    self._train()
            trained, _, _, _ = load_model(self.folder.model)
            self.model.load_state_dict(trained.state_dict())
        about: dict[str, Any] = {}
        if self.folder.result.is_file():
            result = json.loads(self.folder.result.read_text(encoding="utf-8"))
            about = {
                key: result[key] for key in ("method", "task", "metric", "score", "seed", "model") if key in result
            }
            # A teacher is kept whatever the rows are that its own run was scored on.
            rows = result.get("data", {}).get("rows", {}).get("validation")
            if not self.given and rows != len(self.data.validation):
                about = {name: value for name, value in about.items() if name not in ("metric", "score")}
        key = {"folder": str(self.folder.root)} if self.given else {"key": self.folder.root.name}
        return {**about, **key}

    def _train(self) -> None:
        from sparsebert.training.run import Run  # a run may have a teacher, whose training is a run

        begun = distributed.share(self.folder.config.is_file())
        if distributed.is_main():
            print(f"teacher  trained once, kept as {self.folder.root.name}", flush=True)
        Run(self.config, self.folder, resume=begun, data=self.data).execute()


def _config(config: Config, data: TaskData, precision: str) -> Config:
    """The teacher's own configuration: dense fine-tuning on the student's data, by the `teacher_...` settings."""
    run, method = config.run, METHODS[_METHOD]
    teacher = dataclasses.replace(
        run,
        method=_METHOD,
        model=run.teacher_model or run.model,
        precision=precision,
        teacher=None,
        teacher_model=None,
        sparsity=None,
        pattern="unstructured",
        masked=["encoder"],
        allocation="global",
        untouched=False,
        watch_train=False,
        text=[],
        text_length=None,
        output=None,
        resume=None,
        config=None,
    )
    trainer = {key: value for key, value in method.defaults.items() if not hasattr(run, key)}
    trainer |= {"learning_rate": run.teacher_learning_rate, "num_train_epochs": run.teacher_epochs}
    trainer |= {"seed": run.teacher_seed}
    if run.teacher_max_steps > 0:
        trainer["max_steps"] = run.teacher_max_steps
    if config.trainer.get("eval_strategy", "no") != "no":
        # It must not know the slice that its student is watched on: by watching, it holds the same one out.
        trainer["eval_strategy"] = "epoch"
    if teacher.head is None:
        teacher.head = METHODS[run.method].defaults.get("head", "mlp")
    return Config(teacher, method.Settings(), trainer)


def _untrained(config: Config, student: TaskModel) -> tuple[TaskModel, PreTrainedTokenizerBase]:
    run = config.run
    base, tokenizer = load_base(str(demo_model_path()) if run.model == "demo" else run.model)
    model = TaskModel(
        base, student.kind, student.num_labels, head=str(run.head), pooling=run.pooling, seed=int(run.teacher_seed),
        label_names=student.label_names,
    )  # fmt: skip
    return model, tokenizer


def _kept_folder(config: Config, data: TaskData, model: TaskModel) -> Path:
    """Named after everything that the teacher depends on."""
    settings = config.as_dict()
    for key in ("model", "data_dir"):  # where they lie does not matter, what they are does
        settings["run"].pop(key)
    settings["run"].pop("max_eval_samples")
    about = {
        "config": settings,
        "model": model_fingerprint(model.base),
        "data": _learned_from(data.fingerprint),
        "ranks": distributed.world_size(),
    }
    digest = hashlib.sha256(yaml.safe_dump(about, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / "teachers" / f"{data.spec.name}-{digest}"


def _learned_from(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Of the data's fingerprint what training depends on: how many rows a score is taken on is no part of it."""
    about: dict[str, Any] = {**fingerprint, "rows": {"train": fingerprint.get("rows", {}).get("train")}}
    drawn = {key: value for key, value in about.pop("sample", {}).items() if key != "max_eval_samples"}
    return about | ({"sample": drawn} if drawn.get("max_train_samples") is not None else {})


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time trains a teacher; the others wait for it."""
    if not distributed.is_main():
        yield
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.with_suffix(".lock"), "a", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"teacher: cannot write to {folder.parent} ({error}); set SPARSEBERT_CACHE") from error
    # Outside of the try: what goes wrong in the training is no matter of this folder.
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_fit(model: TaskModel, student: TaskModel, its: Any, mine: Any, name: str) -> None:
    if model.kind != student.kind or model.num_labels != student.num_labels:
        raise UserError(
            f"teacher {name}: made for {model.kind} with {model.num_labels} outputs; the task is {student.kind} with "
            f"{student.num_labels}"
        )
    if sorted(model.label_names) != sorted(student.label_names):
        raise UserError(
            f"teacher {name}: its labels are {', '.join(model.label_names)}; the task's are "
            f"{', '.join(student.label_names)}"
        )
    if model.label_names != student.label_names:
        raise UserError(f"teacher {name}: its labels are numbered otherwise than the student's")
    if its.get_vocab() != mine.get_vocab():
        raise UserError(
            f"teacher {name}: its vocabulary of {len(its)} tokens is not the student's of {len(mine)}; distillation "
            "feeds both the same tokens"
        )
