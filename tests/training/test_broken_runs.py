"""Weights that break, and a disk that fills up, in the middle of a run: named, and nothing that was saved is lost."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Workshop

from sparsebert.train import main


def test_broken_weights_are_never_the_last_checkpoint(
    workshop: Workshop, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step may break the weights and leave the loss of that step as it was: then the checkpoint does not count."""
    from sparsebert.training.callbacks import PhaseCallback
    from sparsebert.training.folder import last_checkpoint

    after_step = PhaseCallback.on_step_end

    def broken(self: PhaseCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            self.phase.module.model.head.output.bias.data.fill_(torch.nan)
        after_step(self, args, state, control, **kwargs)

    monkeypatch.setattr(PhaseCallback, "on_step_end", broken)
    command = workshop.command("finetune", "--save-strategy", "steps", "--save-steps", "2", steps=6)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "head.output.bias" in error and "after step 4" in error
    folder = Path(command[command.index("--output") + 1])
    checkpoint = last_checkpoint(folder / "checkpoints" / "00-finetune")
    assert checkpoint is not None and checkpoint.step == 2
    # At the very end no further loss and no further checkpoint would tell.
    assert main(workshop.command("finetune", steps=4)) == 2
    assert "after step 4" in capsys.readouterr().err


def full(*args: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_in_rust(*args: object, **options: object) -> None:
    raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("torch.save", full),
        ("safetensors.torch.save_file", full_in_rust),
        ("sparsebert.training.run.save_file", full_in_rust),
        ("sparsebert.training.run.save_model", full),
        ("sparsebert.training.folder.RunFolder.append_metrics", full),
        ("sparsebert.training.run.write_text", full),
    ],
)
def test_a_full_disk_loses_nothing_that_was_saved(
    workshop: Workshop,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    error: Callable[..., None],
) -> None:
    from sparsebert.training.callbacks import PhaseCallback

    def fills_up(self: PhaseCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:  # the third step begins: a checkpoint of the second is there
            monkeypatch.setattr(place, error)

    monkeypatch.setattr(PhaseCallback, "on_step_begin", fills_up, raising=False)
    command = workshop.command("finetune", "--save-strategy", "steps", "--save-steps", "2", steps=4)
    folder = command[command.index("--output") + 1]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: output {folder}: ") and said.count("\n") == 1
    assert "no space left on the disk" in said and f"--resume {folder}" in said
    monkeypatch.undo()
    assert main(["--resume", folder]) == 0
    assert not Path(folder, "checkpoints").exists()
