"""A run's folder: what lies where, and writing it so that an interruption loses nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from sparsebert.errors import UserError

__all__ = ["RunFolder", "default_output", "guard_disk", "write_text"]

_COMPLETE = "complete.json"


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
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
        self.state = root / "state"
        self.checkpoints = root / "checkpoints"

    def create(self, config: dict[str, Any]) -> None:
        """Makes a new run's folder.

        Raises:
            UserError: the folder holds a run or other files already.
        """
        if self.config.exists():
            raise UserError(
                f"output {self.root}: already holds a run; choose another --output, or go on with --resume {self.root}"
            )
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise UserError(f"output {self.root}: exists and is not empty; choose another --output")
        with guard_disk(self.root):
            self.state.mkdir(parents=True)
            self.checkpoints.mkdir()
            write_text(self.config, yaml.safe_dump(config, sort_keys=False))

    def phase_folder(self, index: int, name: str) -> Path:
        """Where Trainer puts the checkpoints of a phase."""
        return self.checkpoints / f"{index:02d}-{name}"

    def phase_state(self, index: int, name: str) -> Path:
        """The module's tensors at the end of a phase."""
        return self.state / f"{index:02d}-{name}.safetensors"

    def phase_notes(self, index: int, name: str) -> Path:
        """Scores and times of a finished phase; it exists if and only if the phase is finished."""
        return self.state / f"{index:02d}-{name}.json"

    def clear(self) -> None:
        """Removes what only `--resume` needs, when the run is finished."""
        for path in (self.checkpoints, self.state):
            shutil.rmtree(path, ignore_errors=True)

    def truncate_metrics(self, phase: str, step: int) -> None:
        """Drops the lines that a resumed phase will write again."""
        if not self.metrics.exists():
            return
        lines = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off by a kill
            if entry["phase"] != phase or entry["step"] <= step:
                lines.append(line + "\n")
        write_text(self.metrics, "".join(lines))


def mark_complete(checkpoint: Path) -> None:
    """Says that every file of a checkpoint is on disk: written last, with the files' sizes."""
    sizes = {}
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and path.name != _COMPLETE:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            sizes[path.name] = path.stat().st_size
    write_text(checkpoint / _COMPLETE, json.dumps(sizes, indent=1))


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end and its files have kept their sizes."""
    try:
        sizes = json.loads((checkpoint / _COMPLETE).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a phase; incomplete ones are removed."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and is_complete(path):
            found.append((int(number), path))
        else:
            shutil.rmtree(path, ignore_errors=True)
    return max(found)[1] if found else None


@contextmanager
def guard_disk(folder: Path) -> Iterator[None]:
    """Turns a full or read-only disk into an error that says what to do."""
    try:
        yield
    except Exception as error:
        reason = _disk_reason(error, folder)
        if reason is None:
            raise
        raise UserError(
            f"{folder}: {reason}; what was saved before is kept: make room, then go on with --resume "
            "(or start again with another --output)"
        ) from error


def _disk_reason(error: Exception, folder: Path) -> str | None:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return "no space left on the disk"
        if isinstance(seen, OSError) and seen.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            return f"cannot be written ({seen.strerror})"
        text = str(seen)
        if "No space left" in text or "os error 28" in text:
            return "no space left on the disk"
        if "PytorchStreamWriter failed" in text or "unexpected pos" in text:
            existing = next(path for path in (folder, *folder.parents) if path.exists())
            free = shutil.disk_usage(existing).free
            return f"writing a checkpoint failed with {free / 2**20:.0f} MiB free on the disk"
        seen = seen.__cause__ or seen.__context__
    return None
