"""What the disk refuses, said in a user's words."""

from __future__ import annotations

import errno
import os
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsebert.errors import UserError

__all__ = ["guard_disk"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EROFS, errno.EPERM, errno.EIO)


@contextmanager
def guard_disk(folder: Path, *, new: bool = False) -> Iterator[None]:
    """Turns a full disk, or a folder that cannot be written, into an error that says what to do.

    Args:
        folder: of the run.
        new: it is only being made, so that whatever the system refuses is about its name or place.

    Raises:
        UserError: in place of such an error; every other one passes.
    """
    try:
        yield
    except Exception as error:
        reason = _reason(error, folder, new)
        if reason is None:
            raise
        advice = (
            f"what was saved before is kept: make room, then go on with --resume {folder}"
            if os.path.isfile(folder / "config.yaml")
            else "choose another --output"
        )
        raise UserError(f"output {folder}: {reason}; {advice}") from error


def _reason(error: Exception, folder: Path, new: bool) -> str | None:
    seen: BaseException | None = error
    explained = isinstance(error, UserError)
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return "no space left on the disk"
        if isinstance(seen, OSError) and (new or seen.errno in _REFUSED) and not explained:
            return f"cannot be written ({seen.strerror})"
        if "No space left" in str(seen) or "os error 28" in str(seen):
            return "no space left on the disk"
        if isinstance(seen, RuntimeError) and _in_torch_save(seen):
            existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
            free = shutil.disk_usage(existing).free
            return f"writing a checkpoint failed, {free / 2**20:.1f} MiB are free on the disk"
        seen = seen.__cause__ or seen.__context__
    return None


def _in_torch_save(error: RuntimeError) -> bool:
    """torch.save does not pass on what the system said: a full disk is "unexpected pos", "iostream error", and more."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(
        (frame.f_globals.get("__name__"), frame.f_code.co_name) == ("torch.serialization", "save") for frame in frames
    )
