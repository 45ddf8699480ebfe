"""`python -m sparsebert.export RUN --to dense|onnx|openvino|sparse`: a run's model in a form that others take."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sparsebert.errors import UserError
from sparsebert.training.command import run_command

if TYPE_CHECKING:
    from sparsebert.training.folder import RunFolder

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help says how)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, or 2 for a user's error."""
    return run_command(_run, argv)


def _run(argv: Sequence[str]) -> int:
    given = _parser().parse_args(argv)

    from sparsebert.models.export import PARITY, check_packages, export
    from sparsebert.models.storage import load_model
    from sparsebert.reports.card import Card
    from sparsebert.training.folder import RunFolder
    from sparsebert.training.quiet import quiet
    from sparsebert.training.table import plain_table

    quiet()
    check_packages(given.to)
    if given.format is not None and given.to != "sparse":
        raise UserError(f"format: only for --to sparse; {given.to} has one of its own")
    folder = RunFolder(given.run.expanduser())
    _check_run(folder)
    output: Path = (given.output or folder.root / "export" / given.to).expanduser()
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not given.overwrite):
        raise UserError(f"output {output}: exists already; choose another --output, or replace it with --overwrite")
    card = Card(folder)
    model, tokenizer, _, info = load_model(folder.model)
    words = ["--to", given.to, *([] if given.compact else ["--no-compact"])]
    words += [] if given.format is None else ["--format", given.format]
    # Where this machine keeps its runs is of no use to a card's reader.
    command = shlex.join(["python", "-m", "sparsebert.export", "RUN", *words])
    exported = export(
        model,
        tokenizer,
        output,
        given.to,
        info=info,
        compact=given.compact,
        format=given.format or "auto",
        card=lambda made: card.text(made, info, command),
    )
    size = sum(path.stat().st_size for path in output.iterdir() if path.is_file())
    rows = [
        ("exported", exported.what),
        ("parity", f"logits differ by at most {exported.parity:.1e} from the run's ({PARITY:.0e} is let through)"),
        ("written", f"{output}, {size:,} bytes"),
    ]
    print(plain_table(rows))
    print(f"\n{exported.usage.replace('FOLDER', repr(str(output)))}")
    return 0


def _check_run(folder: RunFolder) -> None:
    if not folder.root.is_dir():
        raise UserError(f"{folder.root}: no such folder")
    if not folder.config.is_file():
        raise UserError(f"{folder.root}: holds no run (no {folder.config.name} there)")
    if not folder.model.is_dir():
        raise UserError(
            f"{folder.root}: holds no saved model, the run is not finished; "
            f"go on with:  python -m sparsebert.train --resume {folder.root}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m sparsebert.export",
        description="Write a run's model in another form, check that it computes the same, and describe it in a card.",
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument(
        "--to",
        required=True,
        metavar="TARGET",
        help="dense (a Hugging Face checkpoint), onnx, openvino, or sparse (for sparsebert.AutoSparseModel)",
    )
    parser.add_argument("--output", type=Path, help="a new folder [RUN/export/TARGET]")
    parser.add_argument("--overwrite", action="store_true", help="replace an older export in that folder")
    parser.add_argument(
        "--compact",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take out heads and neurons that are wholly pruned, after the patterns heads and neurons [yes]",
    )
    parser.add_argument("--format", help="sparse only: one format for all layers [measured: what is fastest here]")
    return parser


if __name__ == "__main__":
    sys.exit(main())
