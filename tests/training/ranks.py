"""Started by torchrun: runs the training command several times, as `test_ranks.py` says, and notes what each rank has.

Arguments: a folder for the notes, and a JSON file with a list of steps. A step is `{"words": [...], "signal_at": N}`:
the command line, and the step of a phase at which the last rank alone receives SIGTERM (0 for never).
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

from sparsebert.methods.base import Phase
from sparsebert.train import main
from sparsebert.training import distributed
from sparsebert.training.callbacks import PhaseCallback
from sparsebert.training.interrupt import InterruptCallback
from sparsebert.training.run import Run


def note(folder: Path, name: str, value: object) -> None:
    with (folder / f"rank{distributed.rank()}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps([name, value]) + "\n")


def state_of(run: Run) -> dict[str, str]:
    """Digest of every tensor a rank trains with, masks and scores included."""
    state = run.method.module.state_dict()
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in sorted(state.items())}


def start(notes: Path, steps: list[dict[str, Any]]) -> None:
    run_phase = Run._run_phase
    signal_at = 0

    def noted(run: Run, index: int, phase: Phase, interrupt: InterruptCallback) -> dict[str, Any]:
        done = run_phase(run, index, phase, interrupt)
        note(notes, phase.name, state_of(run))
        return done

    def on_step_begin(self: PhaseCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = distributed.rank() == distributed.world_size() - 1
        if last and self.phase.name == "prune" and state.global_step + 1 == signal_at:
            signal.raise_signal(signal.SIGTERM)

    Run._run_phase = noted  # type: ignore[method-assign]
    PhaseCallback.on_step_begin = on_step_begin  # type: ignore[method-assign,assignment]
    for step in steps:
        signal_at = step["signal_at"]
        note(notes, "status", main(step["words"]))


if __name__ == "__main__":
    start(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
