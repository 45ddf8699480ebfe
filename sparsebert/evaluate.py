"""`python -m sparsebert.evaluate RUN`: loads a saved run and scores it again."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import NoReturn

from sparsebert.errors import UserError

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help says how)")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, or 2 for a user's error."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
    parser = _Parser(prog="python -m sparsebert.evaluate", description="Load a saved run and score it again.")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--data-dir", help="where the data are now, if they have moved")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], help="another precision than the run's")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    given = parser.parse_args(argv)

    from sparsebert.training.arguments import parse_arguments
    from sparsebert.training.folder import RunFolder
    from sparsebert.training.quiet import quiet
    from sparsebert.training.run import evaluate_saved
    from sparsebert.training.table import plain_table

    quiet()
    folder = RunFolder(given.run)
    if not folder.config.is_file() or not folder.model.is_dir():
        hint = f"; it is not finished, go on with --resume {given.run}" if folder.config.is_file() else ""
        raise UserError(f"{given.run}: holds no saved model{hint}")
    config, _, _ = parse_arguments(["--config", str(folder.config)])
    saved = json.loads(folder.result.read_text(encoding="utf-8")) if folder.result.is_file() else None
    changes = {"data_dir": given.data_dir, "precision": given.precision}
    config.run = dataclasses.replace(config.run, **{k: v for k, v in changes.items() if v is not None})
    metrics = evaluate_saved(folder, config)
    if given.json:
        print(json.dumps(metrics))
        return 0
    rows = [(name, f"{value:.6f}") for name, value in metrics.items()]
    if saved is not None:
        same = metrics == saved["metrics"]
        rows.append(("saved result", "the same to the last digit" if same else f"differs: {saved['metrics']}"))
    print(plain_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
