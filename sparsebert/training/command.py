"""How the commands end: one line for a user's error, no traceback; loads nothing heavy."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence

from sparsebert.errors import UserError

__all__ = ["CTRL_C", "run_command"]

CTRL_C = 128 + signal.SIGINT
"""Exit status after Ctrl-C."""


def run_command(action: Callable[[Sequence[str]], int], argv: Sequence[str] | None) -> int:
    """Does a command's work and returns its exit status: its own, 2 for a user's error, 130 after Ctrl-C.

    Args:
        action: takes the arguments, returns the status.
        argv: the arguments; None takes the process's own.
    """
    try:
        return action(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print("error:", " ".join(line.strip() for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print("stopped before there was anything to save", file=sys.stderr)
        return CTRL_C
