"""`python -m sparsebert.train`: finds a subnetwork, saves it, scores it."""

from __future__ import annotations

import sys

from sparsebert.errors import UserError

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 2 for a user's error, 128 + signal after an interruption."""
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
    from sparsebert.training import distributed
    from sparsebert.training.arguments import parse_arguments
    from sparsebert.training.callbacks import Interrupted
    from sparsebert.training.folder import RunFolder, default_output
    from sparsebert.training.quiet import quiet
    from sparsebert.training.run import Run
    from sparsebert.training.table import result_table

    quiet()
    config, output, resume = parse_arguments(argv)
    distributed.start()
    root = output or distributed.share(default_output(config.run.task, config.run.method))
    folder = RunFolder(root)
    if resume and folder.result.exists():
        raise UserError(f"resume {root}: this run is finished; see {folder.result}")
    try:
        result = Run(config, folder, resume=resume).execute()
    except Interrupted as stop:
        if distributed.is_main():
            print(f"{stop}; go on with:  python -m sparsebert.train --resume {root}", file=sys.stderr)
        return 128 + stop.signal_number
    if distributed.is_main():
        print(result_table(result, folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
