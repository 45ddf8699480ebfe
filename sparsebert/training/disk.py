"""What the disk refuses, said in a user's words."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsebert.errors import UserError

__all__ = ["guard_disk"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO)


@contextmanager
def guard_disk(folder: Path) -> Iterator[None]:
    """Turns a full disk, or a folder that cannot be written, into an error that says what to do.

    Raises:
        UserError: in place of such an error; every other one passes.
    """
    try:
        yield
    except Exception as error:
        reason = _reason(error, folder)
        if reason is None:
            raise
        advice = (
            f"what was saved before is kept: make room, then go on with --resume {folder}"
            if os.path.isfile(folder / "config.yaml")
            else "choose another --output"
        )
        raise UserError(f"output {folder}: {reason}; {advice}") from error


def _reason(error: Exception, folder: Path) -> str | None:
    seen: BaseException | None = error
    explained = isinstance(error, UserError)
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return "no space left on the disk"
        if isinstance(seen, OSError) and seen.errno in _REFUSED and not explained:
            return f"cannot be written ({seen.strerror})"
        text = str(seen)
        if "No space left" in text or "os error 28" in text:
            return "no space left on the disk"
        if "PytorchStreamWriter failed" in text or "unexpected pos" in text:
            existing = next(path for path in (folder, *folder.parents) if path.exists())
            free = shutil.disk_usage(existing).free
            return f"writing a checkpoint failed with {free / 2**20:.0f} MiB free on the disk"
        seen = seen.__cause__ or seen.__context__
    return None
