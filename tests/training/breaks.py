"""Interrupting a run where a test wants it, and comparing what two runs left."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from sparsebert.training.callbacks import PhaseCallback
from sparsebert.training.folder import Checkpoint


class PowerCut(BaseException):
    """Nothing gets to tidy up or to save: what kill -9 leaves."""


class Breaks:
    """Breaks runs in this process.

    Args:
        monkeypatch: takes the breaks out again at the end of the test.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self._at: dict[tuple[str, int], list[int]] = {}
        self._torn: tuple[str, int] | None = None
        monkeypatch.setattr(PhaseCallback, "on_step_begin", self._step, raising=False)
        complete = Checkpoint.complete

        def tear(checkpoint: Checkpoint, **about: Any) -> None:
            if self._torn is not None and checkpoint.path.match(f"*-{self._torn[0]}/checkpoint-{self._torn[1]}"):
                self._torn = None
                with checkpoint.weights.open("r+b") as file:
                    file.truncate(checkpoint.weights.stat().st_size // 2)
                raise PowerCut
            complete(checkpoint, **about)

        monkeypatch.setattr(Checkpoint, "complete", tear)

    def signal_at(self, phase: str, step: int, *numbers: int) -> None:
        """Signals during a step of a phase; one SIGINT if none is named."""
        self._at[phase, step] = list(numbers) or [signal.SIGINT]

    def cut_at(self, phase: str, step: int) -> None:
        """A power cut during a step of a phase."""
        self._at[phase, step] = []

    def tear_at(self, phase: str, step: int) -> None:
        """A power cut in the middle of the checkpoint of a step."""
        self._torn = (phase, step)

    def cut_in(self, owner: Any, name: str, *, after: bool = False) -> None:
        """A power cut in the next call of a function, before it does anything or when it is done."""
        function = getattr(owner, name)

        def cut(*args: Any, **options: Any) -> None:
            self.monkeypatch.setattr(owner, name, function)
            if after:
                function(*args, **options)
            raise PowerCut

        self.monkeypatch.setattr(owner, name, cut)

    def _step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for (phase, step), numbers in list(self._at.items()):
            if state.global_step + 1 == step and Path(args.output_dir).name.endswith(f"-{phase}"):
                del self._at[phase, step]
                if not numbers:
                    raise PowerCut
                for number in numbers:
                    signal.raise_signal(number)


def left_by(folder: Path) -> dict[str, Any]:
    """Everything a run left that does not tell the time, for comparing with another's."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    del result["seconds"]
    for phase in result["phases"]:
        del phase["train_seconds"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    log = [{k: v for k, v in line.items() if "seconds" not in k and "per_second" not in k and "runtime" not in k}
           for line in lines]  # fmt: skip
    files = {path.name: path.read_bytes() for path in sorted((folder / "model").iterdir())}
    return {
        "result": result,
        "log": log,
        "files": files,
        "config": (folder / "config.yaml").read_text(encoding="utf-8"),
    }


def assert_same(first: Path, second: Path) -> None:
    """Fails unless two runs left the same, to the last bit."""
    one, other = left_by(first), left_by(second)
    assert one["log"] == other["log"]
    assert one["result"] == other["result"]
    assert one["files"].keys() == other["files"].keys()
    assert [name for name, content in one["files"].items() if content != other["files"][name]] == []
    assert one["config"] == other["config"]
    assert sorted(path.name for path in first.iterdir()) == sorted(path.name for path in second.iterdir())
