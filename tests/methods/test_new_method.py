"""A new method takes one file, one line in METHODS and one test: here all three, without touching anything else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch

from sparsebert.methods import METHODS, Method, Phase
from sparsebert.methods.base import check_setting
from sparsebert.methods.phases import HEAD_DEFAULTS, HeadPhase


@dataclass(frozen=True)
class Settings:
    """Settings of the toy."""

    keep_first: bool = False
    """Whether the first rows are kept in place of the last."""
    strength: float = 1.0
    """How strongly, from 0 [the toy's own number]."""


class _Steps(HeadPhase):
    """Prunes a little more after every step."""

    def after_step(self, step: int, total: int) -> bool:
        self.method.prune(step / total)  # type: ignore[attr-defined]
        return False

    def logs(self) -> dict[str, float]:
        return {"sparsity": self.method.masks.sparsity(), "strength": self.method.settings.strength}


class RowsFirst(Method):
    """Prunes the first rows of every matrix."""

    name = "rows_first"
    summary = "prune the first rows: a toy"
    Settings = Settings
    defaults: ClassVar[dict[str, Any]] = {**HEAD_DEFAULTS, "learning_rate": 2e-3}

    def check(self) -> None:
        super().check()
        check_setting("strength", self.settings.strength, self.settings.strength >= 0.0, "0 or more")

    def prune(self, share: float) -> None:
        sign = -1.0 if self.settings.keep_first else 1.0
        scores: list[Any] = []
        for group in self.masks.groups:
            rows = torch.arange(group.shape[0], dtype=torch.float32)
            scores.append(
                sign * self.settings.strength * rows.reshape(-1, *[1] * (len(group.shape) - 1)).expand(group.shape)
            )
        self.masks.select(scores, share * self.context.sparsity, "matrix")

    def phases(self) -> list[Phase]:
        return [*self.untouched_phases(), _Steps(self, "toy")]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "rows_first", RowsFirst)


@pytest.mark.usefixtures("registered")
def test_it_trains_through_the_command(tmp_path: Path) -> None:
    workshop = tiny.Workshop(tmp_path)
    outcome = workshop.run("rows_first", "--sparsity", "0.25", "--strength", "2", "--keep-first", steps=4)
    assert outcome.result["method"] == "rows_first"
    outcome.check_zeros()
    outcome.check_survivors()
    for mask in outcome.masks.values():
        rows = mask.shape[0]
        assert bool(mask[: rows * 3 // 4].all()) and not bool(mask[rows * 3 // 4 :].any())
    assert outcome.numbers("sparsity", "toy") == [0.0625, 0.125, 0.1875, 0.25]
    assert outcome.numbers("strength", "toy") == [2.0] * 4
    assert "untouched" in outcome.result
    config = (outcome.folder / "config.yaml").read_text(encoding="utf-8")
    assert "strength: 2.0" in config and "keep_first: true" in config


@pytest.mark.usefixtures("registered")
def test_its_settings_are_flags_with_their_docstrings_as_help(capsys: pytest.CaptureFixture[str]) -> None:
    from sparsebert.train import main

    with pytest.raises(SystemExit) as stop:
        main(["--method", "rows_first", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "rows_first prune the first rows: a toy" in text
    assert "--strength STRENGTH how strongly, from 0" in text
    assert "--keep-first" in text


@pytest.mark.usefixtures("registered")
def test_its_own_checks_are_errors_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparsebert.train import main

    assert main(tiny.Workshop(tmp_path).command("rows_first", "--strength", "-1")) == 2
    assert "strength -1: expected 0 or more" in capsys.readouterr().err
    assert main(["--method", "row_first"]) == 2
    assert "did you mean 'rows_first'" in capsys.readouterr().err
