"""`python -m sparsebert.train`: finds a subnetwork, saves it, scores it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsebert.errors import UserError
from sparsebert.training.command import CTRL_C, run_command

if TYPE_CHECKING:
    from sparsebert.training.folder import RunFolder
    from sparsebert.training.run import Run

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 2 for a user's error, 128 + signal after an interruption."""
    return run_command(_run, argv)


def _run(argv: Sequence[str]) -> int:
    from sparsebert.training import distributed
    from sparsebert.training.arguments import parse_arguments
    from sparsebert.training.folder import RunFolder, default_output
    from sparsebert.training.quiet import quiet
    from sparsebert.training.run import Run

    quiet()
    try:
        config, output, resume = parse_arguments(argv)
        distributed.start()
        folder = RunFolder(output or distributed.share(default_output(config.run.task, config.run.method)))
        if resume and folder.result.exists():
            folder.clear()  # a kill in the last moment leaves what only an unfinished run needs
            raise UserError(f"resume {folder.root}: this run is finished; see {folder.result}")
        run = Run(config, folder, resume=resume)
    except UserError:
        # What is wrong here is wrong for every rank: one of them says so.
        if distributed.speaks():
            raise
        return 2
    try:
        return _execute(run)
    except UserError as error:
        raise UserError(f"rank {distributed.rank()}: {error}" if distributed.rank() else str(error)) from error


def _execute(run: Run) -> int:
    from sparsebert.training import distributed
    from sparsebert.training.interrupt import Interrupted
    from sparsebert.training.table import result_table

    go_on = f"go on with:  {_resume_command(run.folder, distributed.world_size())}"
    try:
        result = run.execute()
    except Interrupted as stop:
        if distributed.is_main():
            print(f"{stop}; {go_on}", file=sys.stderr)
        return 128 + stop.signal_number
    except KeyboardInterrupt:
        if distributed.is_main():
            print(f"stopped at once, what was saved before is kept; {go_on}", file=sys.stderr)
        return CTRL_C
    if distributed.is_main():
        print(result_table(result, run.folder))
    return 0


def _resume_command(folder: RunFolder, ranks: int) -> str:
    start = "python" if ranks == 1 else f"torchrun --nproc-per-node {ranks}"
    return f"{start} -m sparsebert.train --resume {shlex.quote(str(folder.root))}"


if __name__ == "__main__":
    sys.exit(main())
