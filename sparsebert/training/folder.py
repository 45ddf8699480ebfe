"""A run's folder: what lies where, and writing it so that an interruption loses nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from sparsebert.errors import UserError
from sparsebert.training.disk import guard_disk

__all__ = ["Checkpoint", "RunFolder", "default_output", "last_checkpoint", "write_text"]

# A phase's last line in metrics.jsonl, and no other, has this number.
_SUMMARY = "train_seconds"


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
    put_in_place(temporary, path)


def put_in_place(temporary: Path, path: Path) -> None:
    """Gives a finished file its name, once it is on disk."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def default_output(task: str, method: str) -> Path:
    """The first free `runs/TASK-METHOD-N`."""
    number = 1
    while (path := Path("runs") / f"{task}-{method}-{number}").exists():
        number += 1
    return path


class RunFolder:
    """Paths and state of one run.

    `config.yaml` (resolved), `metrics.jsonl`, `result.json`, `model/` (see `sparsebert.models.storage`) are for users;
    `state/` (finished phases) and `checkpoints/` (of the phase under way) are what `--resume` needs, and go at the end.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.metrics = root / "metrics.jsonl"
        self.result = root / "result.json"
        self.model = root / "model"
        self.reports = root / "tensorboard"
        self.state = root / "state"
        self.checkpoints = root / "checkpoints"
        self._inputs = self.state / "inputs.json"

    def check_free(self) -> None:
        """A `UserError` if the folder holds a run or other files already, or cannot be a folder."""
        with guard_disk(self.root, new=True):
            if self.config.exists():
                raise UserError(
                    f"output {self.root}: already holds a run; choose another --output, "
                    f"or go on with --resume {self.root}"
                )
            if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
                raise UserError(f"output {self.root}: exists and is not empty; choose another --output")

    def create(self, config: dict[str, Any], inputs: dict[str, Any]) -> None:
        """Makes a new run's folder.

        Args:
            config: for config.yaml.
            inputs: what data and model are, and on how many ranks they are trained; see `check_inputs`.

        Raises:
            UserError: the folder holds a run or other files already, or cannot be made.
        """
        self.check_free()
        with guard_disk(self.root, new=True):
            self.state.mkdir(parents=True)
            try:
                self.checkpoints.mkdir()
                write_text(self._inputs, json.dumps(inputs))
                # Last: a folder with this file is a run that can be resumed.
                write_text(self.config, yaml.safe_dump(config, sort_keys=False))
            except BaseException:
                self.clear()
                raise

    def check_inputs(self, inputs: dict[str, Any]) -> None:
        """A `UserError` if a resumed run is given something else than it began with."""
        try:
            first = json.loads(self._inputs.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"resume {self.root}: {self._inputs} is missing or damaged; start a new run") from error
        for name, value in json.loads(json.dumps(inputs)).items():
            if first.get(name) != value:
                change = f"{first.get(name)} before, {value} now" if name == "ranks" else "not what the run began with"
                raise UserError(f"resume {self.root}: {name}: {change}; put it back, or start a new run")

    def phase_folder(self, index: int, name: str) -> Path:
        """Where Trainer puts the checkpoints of a phase."""
        return self.checkpoints / f"{index:02d}-{name}"

    def drop_checkpoints(self, index: int, name: str) -> None:
        """Makes room: a phase whose state and notes are there needs its checkpoints no more."""
        shutil.rmtree(self.phase_folder(index, name), ignore_errors=True)

    def phase_state(self, index: int, name: str) -> Path:
        """The module's tensors at the end of a phase."""
        return self.state / f"{index:02d}-{name}.safetensors"

    def phase_notes(self, index: int, name: str) -> dict[str, Any]:
        """Steps, times and scores of a phase; empty as long as it is not trained to its end."""
        path = self._notes(index, name)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def write_notes(self, index: int, name: str, notes: dict[str, Any]) -> None:
        """Keeps them; the phase's state must be there before."""
        write_text(self._notes(index, name), json.dumps(notes))

    def _notes(self, index: int, name: str) -> Path:
        return self.state / f"{index:02d}-{name}.json"

    def clear(self) -> None:
        """Removes what only `--resume` needs, and what killed saves left, when the run is finished."""
        for path in (self.checkpoints, self.state, *self.root.glob(f".{self.model.name}.*")):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.root.glob("*.tmp"):
            path.unlink(missing_ok=True)

    def append_metrics(self, entry: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl; a number that is not finite becomes null, which JSON can hold."""
        entry = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in entry.items()}
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def phase_summary(self, phase: str, step: int, loss: float, seconds: float) -> None:
        """A phase's last line in metrics.jsonl."""
        self.append_metrics({"phase": phase, "step": step, "train_loss": loss, _SUMMARY: seconds})

    def truncate_metrics(self, phase: str, step: int) -> None:
        """Drops the lines that a phase will write again when it goes on from `step` (-1: from its beginning)."""
        if not self.metrics.exists():
            return
        lines = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                again = entry["phase"] == phase and (entry["step"] > step or _SUMMARY in entry)
            except (ValueError, KeyError, TypeError):
                continue  # cut off by a kill
            if not again:
                lines.append(line + "\n")
        write_text(self.metrics, "".join(lines))


class Checkpoint:
    """One of Trainer's checkpoints, with what a phase needs beside, written last of all.

    Args:
        path: `.../checkpoint-STEP`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step = int(path.name.removeprefix("checkpoint-"))
        self._mark = path / "complete.json"

    def complete(self, *, ended: bool, seconds: float, losses: list[list[float]]) -> None:
        """Says that every file is on disk, with the files' sizes, and how far the phase is."""
        sizes = {}
        for path in sorted(self.path.iterdir()):
            if path.is_file() and path != self._mark:
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                sizes[path.name] = path.stat().st_size
        about = {"ended": ended, "seconds": seconds, "losses": losses, "sizes": sizes}
        write_text(self._mark, json.dumps(about, indent=1))

    def read(self) -> dict[str, Any] | None:
        """What `complete` wrote; None if the checkpoint was not written to its end or its files have other sizes."""
        try:
            about = json.loads(self._mark.read_text(encoding="utf-8"))
            sound = all((self.path / name).stat().st_size == size for name, size in about["sizes"].items())
            return about if sound and {"ended", "seconds", "losses"} <= set(about) else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    @property
    def weights(self) -> Path:
        """The training module's tensors."""
        return self.path / "model.safetensors"

    def best(self) -> Path:
        """The tensors of the phase's best checkpoint so far, for `--load-best-model-at-end`; else this one's."""
        state = json.loads((self.path / "trainer_state.json").read_text(encoding="utf-8"))
        step = state.get("best_global_step")
        path = self.path.with_name(f"checkpoint-{step}") / self.weights.name
        return path if step and path.is_file() else self.weights


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a phase; incomplete ones are removed."""
    found: list[Checkpoint] = []
    for path in folder.glob("checkpoint-*"):
        if path.name.removeprefix("checkpoint-").isdigit() and Checkpoint(path).read() is not None:
            found.append(Checkpoint(path))
        else:
            shutil.rmtree(path, ignore_errors=True)
    return max(found, key=lambda checkpoint: checkpoint.step, default=None)
