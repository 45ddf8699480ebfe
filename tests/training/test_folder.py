"""The folder of a run: written whole or not at all, and read with suspicion."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path

import pytest
import torch

from sparsebert.errors import UserError
from sparsebert.training.disk import guard_disk
from sparsebert.training.folder import Checkpoint, RunFolder, default_output, last_checkpoint, write_text


def lines(folder: RunFolder) -> list[dict[str, object]]:
    return [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]


def test_the_log_goes_back_to_a_step_and_keeps_other_phases(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.truncate_metrics("prune", -1)  # nothing is there yet
    for phase in ("untouched", "prune"):
        for step in (1, 2, 3):
            folder.append_metrics({"phase": phase, "step": step, "loss": float("nan") if step == 2 else 0.5})
        folder.phase_summary(phase, 3, 0.5, 1.0)
    before = lines(folder)
    assert before[1]["loss"] is None
    with folder.metrics.open("ab") as file:
        file.write(b'{"phase": "prune", "st\xff')
    folder.truncate_metrics("prune", 2)
    assert lines(folder) == before[:6]
    folder.truncate_metrics("prune", -1)
    assert lines(folder) == before[:4]
    folder.truncate_metrics("other", -1)
    assert lines(folder) == before[:4]


def test_a_text_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def cut(*args: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(OSError):
        write_text(path, "new")
    assert path.read_text() == "old"


def checkpoint(folder: Path, step: int) -> Checkpoint:
    made = Checkpoint(folder / f"checkpoint-{step}")
    made.path.mkdir(parents=True)
    made.weights.write_bytes(b"weights")
    return made


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "none") is None
    for step in (2, 10, 9):
        checkpoint(tmp_path, step).complete(ended=False, seconds=1.5, losses=[[0.0, 0, 0.0, 0]])
    checkpoint(tmp_path, 11)
    (tmp_path / "checkpoint-last").mkdir()
    last = last_checkpoint(tmp_path)
    assert last is not None and last.step == 10
    about = last.read()
    assert about is not None and about["seconds"] == 1.5 and about["ended"] is False
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2", "checkpoint-9"]
    last.weights.write_bytes(b"cut")
    again = last_checkpoint(tmp_path)
    assert again is not None and again.step == 9
    for damage in ("[]", "{}", '{"sizes": {}}', '{"sizes": {"gone": 1}, "ended": 0, "seconds": 0, "losses": []}', "\0"):
        (again.path / "complete.json").write_text(damage, encoding="utf-8")
        assert again.read() is None


def test_the_best_checkpoint(tmp_path: Path) -> None:
    first, second = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    state = second.path / "trainer_state.json"
    for step, best in ((None, second), (1, first), (7, second)):
        state.write_text(json.dumps({"best_global_step": step}), encoding="utf-8")
        assert second.best() == best.weights


def test_a_new_folder_is_taken_back_if_it_cannot_be_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "deep" / "run")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="no space left on the disk; choose another --output"):
            folder.create({}, {})
    assert list(folder.root.iterdir()) == []
    folder.create({"run": {}}, {"ranks": 1})
    with pytest.raises(UserError, match="already holds a run"):
        folder.create({}, {})
    folder.check_inputs({"ranks": 1})


def test_the_first_free_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_output("demo", "gmp") == Path("runs/demo-gmp-1")
    (tmp_path / "runs" / "demo-gmp-1").mkdir(parents=True)
    assert default_output("demo", "gmp") == Path("runs/demo-gmp-2")


def test_only_what_the_disk_refuses_becomes_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), guard_disk(tmp_path):
        _ = 1 / 0
    with pytest.raises(FileNotFoundError), guard_disk(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "gone")
    with pytest.raises(UserError, match=r"^as it was$"), guard_disk(tmp_path):
        raise UserError("as it was") from PermissionError(errno.EACCES, "no")
    with pytest.raises(UserError, match="no space left"), guard_disk(tmp_path):
        raise UserError("cannot save") from OSError(errno.ENOSPC, "full")
    with pytest.raises(UserError, match="no space left"), guard_disk(tmp_path):
        try:
            raise OSError(errno.EDQUOT, "quota")
        except OSError:
            raise KeyError("while tidying") from None
    with pytest.raises(UserError, match="Permission"), guard_disk(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_torch_save_does_not_say_what_the_system_said(tmp_path: Path) -> None:
    """What fails within torch.save is about the disk, what fails within torch.load is not."""

    class Full(io.BytesIO):
        def write(self, content: object) -> int:
            raise RuntimeError("basic_ios::clear: iostream error")

    with pytest.raises(UserError, match=r"writing a checkpoint failed.*MiB are free"), guard_disk(tmp_path / "new"):
        torch.save({"a": torch.zeros(3)}, Full())
    torch.save({"a": torch.zeros(3)}, tmp_path / "file")
    with pytest.raises(RuntimeError, match="nowhere"), guard_disk(tmp_path):
        torch.load(tmp_path / "file", map_location="nowhere", weights_only=True)
