"""What was measured once on this machine, remembered: in the process, and in a small JSON file between processes.

The file is `choices.json` in the cache folder (`$SPARSEBERT_CACHE`, else `~/.cache/sparsebert`). It only saves time:
one that is missing, broken or not writable costs new measurements and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sparsebert import __version__, _build, _load

__all__ = ["forget_choices", "machine", "path", "recall", "remember"]

VERSION = 1
# One entry is about a kilobyte; the oldest go first.
MOST = 2000

_memo: dict[tuple[Path, str], dict[str, Any]] = {}


def path() -> Path:
    """Where the file is."""
    return _load.cache_dir() / "choices.json"


def machine(device: torch.device) -> dict[str, Any]:
    """What a timing depends on besides the layer: processor or GPU, threads, kernels asked for, versions."""
    # An eager GPU layer of little work takes as long as the processor needs to launch it.
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "backend": os.environ.get("SPARSEBERT_BACKEND", ""),
        "torch": torch.__version__,
        "sparsebert": __version__,
        "extension": _extension(),
        "device": device.type,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["capability"] = list(torch.cuda.get_device_capability(device))
        found["cuda"], found["triton"] = torch.version.cuda, _triton_version()
        return found
    found["cores"], found["threads"] = os.cpu_count(), torch.get_num_threads()
    return {**found, "isa": os.environ.get("SPARSEBERT_ISA", "")}


def recall(key: str) -> dict[str, Any] | None:
    """What `remember` was given under `key`, in this process or an earlier one; None where nothing was."""
    place = (path(), key)
    if place not in _memo:
        entry = _read(place[0]).get(key)
        if not isinstance(entry, dict):
            return None
        _memo[place] = entry
    return _memo[place]


def remember(key: str, entry: dict[str, Any]) -> None:
    """Keeps `entry`, plain JSON values, under `key`. A file that cannot be written is no error."""
    file = path()
    _memo[file, key] = entry
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file.with_suffix(".lock")):
            entries = {other: value for other, value in _read(file).items() if other != key}
            entries[key] = entry
            _write(file, dict(list(entries.items())[-MOST:]))


def forget_choices() -> None:
    """Forgets every remembered choice, the file's too, so that the next ones are measured anew."""
    file = path()
    _memo.clear()
    with contextlib.suppress(OSError), _locked(file.with_suffix(".lock")):
        file.unlink(missing_ok=True)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    entries = found.get("choices") if isinstance(found, dict) and found.get("version") == VERSION else None
    return entries if isinstance(entries, dict) else {}


def _write(file: Path, entries: dict[str, Any]) -> None:
    """Puts a whole new file in the old one's place, so that a reader never sees half of one."""
    text = json.dumps({"version": VERSION, "choices": entries}, indent=1)
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as fresh:
            fresh.write(text)
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Holds the lock, so that of two processes that add an entry neither loses the other's; no lock where none work."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with file.open("w") as lock:
        # Some network file systems have no locks: an entry may then be lost, and is measured again.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _triton_version() -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("triton")
    return "none"


@functools.cache
def _extension() -> str:
    """Hash of the sources that the loaded binaries were built from, or "none"."""
    if _load.missing("cpu") is not None:
        return "none"
    return str(_build.read_record(_load.library_dir()).get("hash", "unknown"))
