"""`python -m sparsebert.evaluate RUN`: loads a saved run and scores it again."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sparsebert.errors import UserError
from sparsebert.training.command import run_command

if TYPE_CHECKING:
    from sparsebert.data import TaskData
    from sparsebert.training.folder import RunFolder

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help says how)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, or 2 for a user's error."""
    return run_command(_run, argv)


def _run(argv: Sequence[str]) -> int:
    parser = _Parser(prog="python -m sparsebert.evaluate", description="Load a saved run and score it again.")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--data-dir", help="where the data are now, if they have moved")
    parser.add_argument(
        "--precision", choices=["auto", "fp32", "bf16", "fp16"], help="another precision than the run's"
    )
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    given = parser.parse_args(argv)

    from sparsebert.training.arguments import parse_arguments
    from sparsebert.training.config import load_run_task
    from sparsebert.training.folder import RunFolder
    from sparsebert.training.quiet import quiet
    from sparsebert.training.scoring import evaluate_saved
    from sparsebert.training.table import plain_table

    quiet()
    folder = RunFolder(given.run.expanduser())
    saved = _saved(folder)
    config, _, _ = parse_arguments(["--config", str(folder.config)])
    changes = {"data_dir": given.data_dir, "precision": given.precision}
    config.run = dataclasses.replace(config.run, **{k: v for k, v in changes.items() if v is not None})
    config.check()
    data = load_run_task(config.run, require_train=False)
    metrics = evaluate_saved(folder, config, data)
    if given.json:
        print(json.dumps(metrics))
        return 0
    rows = [(name, f"{value:.6f}") for name, value in metrics.items()]
    print(plain_table([*rows, ("saved result", _comparison(metrics, saved, data))]))
    return 0


def _saved(folder: RunFolder) -> dict[str, Any] | None:
    """What result.json holds; None where the run is not finished, though its model is there."""
    if not folder.root.is_dir():
        raise UserError(f"{folder.root}: no such folder")
    if not folder.config.is_file():
        raise UserError(f"{folder.root}: holds no run (no {folder.config.name} there)")
    if not folder.model.is_dir():
        raise UserError(
            f"{folder.root}: holds no saved model, the run is not finished; "
            f"go on with:  python -m sparsebert.train --resume {folder.root}"
        )
    if not folder.result.is_file():
        return None
    try:
        saved = json.loads(folder.result.read_text(encoding="utf-8"))
        if not isinstance(saved["metrics"], dict) or not isinstance(saved["data"], dict):
            raise TypeError("metrics and data should be tables")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder.result}: damaged ({error}); remove it to evaluate the model all the same") from error
    return saved


def _comparison(metrics: dict[str, float], saved: dict[str, Any] | None, data: TaskData) -> str:
    """How the score stands to the one in result.json, and why it may differ."""
    if saved is None:
        return "none: the run was not finished"
    now = {name: value for name, value in data.fingerprint.items() if name not in ("train", "rows")}
    changed = [name for name, value in now.items() if value != saved["data"].get(name)]
    other = f" (other data: {', '.join(changed)})" if changed else ""
    return (
        f"the same to the last digit{other}" if metrics == saved["metrics"] else f"differs{other}: {saved['metrics']}"
    )


if __name__ == "__main__":
    sys.exit(main())
