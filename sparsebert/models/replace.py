"""Replacing a folder as a whole, so that a reader never finds half of one."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

from sparsebert.errors import UserError
from sparsebert.models.folder import first_line

__all__ = ["out_of_space", "previous_of", "put_folder", "replace_folder"]

_ABANDONED_SECONDS = 3600


def replace_folder(target: Path, write: Callable[[Path], None], replaced: Collection[str]) -> None:
    """Writes a folder beside `target`, flushes it to disk, and puts it in `target`'s place in one step.

    At every moment `target` is either the whole old folder or the whole new one. (Where the system cannot exchange
    two folders, the old one lies for an instant at `previous_of(target)`, and the next save puts it back.) On any
    error the new folder is removed and the old one is untouched.

    Args:
        target: an existing or a new folder; missing parents are made.
        write: fills the empty folder that it is given.
        replaced: names that belong to what is replaced. What else lies in the old folder is the user's and is kept.

    Raises:
        OSError: as writing raises it.
    """
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    _tidy(target)
    fresh = target.parent / f".{target.name}.saving-{secrets.token_hex(4)}"
    fresh.mkdir()
    try:
        write(fresh)
        if target.is_dir():
            _keep_others(target, fresh, replaced)
        _flush(fresh)
        old = _put_in_place(fresh, target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    _flush_folder(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def put_folder(target: Path, write: Callable[[Path], None], replaced: Collection[str]) -> None:
    """`replace_folder`, with a `UserError` for a disk that is full or a place that cannot be written."""
    try:
        replace_folder(target, write, replaced)
    except Exception as error:  # the tokenizer's library raises bare exceptions for what the system refuses
        if out_of_space(error):
            raise UserError(f"{target}: no space left on its disk; nothing was changed, make room") from error
        if isinstance(error, OSError):
            raise UserError(f"{target}: cannot be written ({first_line(error)}); nothing was changed") from error
        raise


def previous_of(target: Path) -> Path:
    """Where the old folder lies if a save was cut off between two renames."""
    return target.parent / f".{target.name}.previous"


def out_of_space(error: BaseException) -> bool:
    """Whether `error` says that the disk or the quota is full; libraries in Rust say so only in words."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(error) for words in ("No space left on device", "os error 28", "os error 122"))


def _tidy(target: Path) -> None:
    """Puts right what a killed save left; what is young enough to belong to one that still runs stays."""
    if previous_of(target).is_dir() and not target.exists():
        os.rename(previous_of(target), target)
    for path in target.parent.glob(f".{target.name}.saving-*"):
        try:
            abandoned = time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
        except OSError:  # the other save has just finished
            continue
        if abandoned:
            shutil.rmtree(path, ignore_errors=True)


def _keep_others(target: Path, fresh: Path, replaced: Collection[str]) -> None:
    """Links what is the user's own in `target` into `fresh`, or copies it where links are not to be had."""
    for path in target.iterdir():
        place = fresh / path.name
        if path.name in replaced or place.exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, place, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(str(path), str(place))


def _link_or_copy(source: str, place: str) -> None:
    try:
        os.link(source, place, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, place, follow_symlinks=False)


def _put_in_place(fresh: Path, target: Path) -> Path | None:
    """Swaps the two folders and returns where the old one now lies, if there was one."""
    # A rename takes the place of an empty folder, but not of a filled one.
    if not target.is_dir() or not any(target.iterdir()):
        os.rename(fresh, target)
        return None
    if _exchange(fresh, target):
        return fresh
    old = previous_of(target)
    shutil.rmtree(old, ignore_errors=True)
    os.rename(target, old)
    try:
        os.rename(fresh, target)
    except OSError:
        os.rename(old, target)
        raise
    return old


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two folders atomically; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library older than glibc 2.28
        return False
    working_folder, exchange = -100, 2
    return bool(renameat2(working_folder, os.fsencode(first), working_folder, os.fsencode(second), exchange) == 0)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems flush no folders; the files in it are safe by now.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
