"""The compiled libraries at run time: found where they were installed, else built once, then loaded.

Installed binaries count only while their recorded hash is that of the sources beside them, so editing csrc/ never runs
a stale binary. Otherwise the extension is built into a cache folder named after the hash (`$SPARSEBERT_CACHE`, else
`~/.cache/sparsebert`), under a lock, so that parallel processes build it once.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from sparsebert import _build

__all__ = ["cache_dir", "host", "library_dir", "missing"]

# What was found out in this process; a failed build is not tried twice.
_state: dict[str, Any] = {}


def missing(backend: str) -> str | None:
    """Load the library of `backend` ("cpu" or "cuda"), building it if need be; why it is not there, or None."""
    key = f"missing {backend}"
    if key not in _state:
        _state[key] = _load_cuda() if backend == "cuda" else _load_cpu()
    return _state[key]


def library_dir() -> Path:
    """The folder of binaries that fit the sources, built now if there is none.

    Raises:
        BuildError: there is none and none can be built.
    """
    if "folder" not in _state:
        try:
            _state["folder"] = _find_or_build()
        except _build.BuildError as error:
            _state["folder"] = error
    found = _state["folder"]
    if isinstance(found, _build.BuildError):
        raise found
    return found


def host() -> ModuleType | None:
    """The module of CPU features (`csrc/host.cpp`), or None where it was not built."""
    if "host" not in _state:
        _state["host"] = _load_host()
    return _state["host"]


def _load_host() -> ModuleType | None:
    try:
        path = library_dir() / _build.HOST
    except _build.BuildError:
        return None
    spec = importlib.util.spec_from_file_location("sparsebert._host", path)
    if spec is None or spec.loader is None or not path.is_file():
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cache_dir() -> Path:
    """Where first-use builds go: `$SPARSEBERT_CACHE`, else `$XDG_CACHE_HOME/sparsebert`, else `~/.cache/sparsebert`."""
    named = os.environ.get("SPARSEBERT_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsebert"


def _load_cpu() -> str | None:
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        return f"torch {torch.__version__} is older than 2.10, the first with the stable ABI used here"
    try:
        torch.ops.load_library(str(library_dir() / "_C.so"))
    except _build.BuildError as error:
        return str(error)
    except OSError as error:
        return f"{library_dir() / '_C.so'} does not load: {error}"
    return None


def _load_cuda() -> str | None:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    # The schemas are in the CPU library.
    reason = missing("cpu")
    if reason is not None:
        return reason
    path = library_dir() / "_C_cuda.so"
    if not path.is_file():
        failed = _build.read_record(library_dir()).get("failed")
        why = failed.get("_C_cuda.so") if isinstance(failed, dict) else None
        return str(why or "the CUDA library was not built")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path} does not load: {error}"
    return None


def _find_or_build() -> Path:
    sources = _build.source_dir()
    package = Path(__file__).resolve().parent
    if sources is None:
        if _complete(package, None):
            return package
        raise _build.BuildError("neither binaries nor their sources (csrc/) are installed")
    digest = _build.source_hash(sources)
    if _complete(package, digest):
        return package
    cuda = _wants_cuda()
    kind = "".join(f"-{word}" for word in (*(["cuda"] if cuda else []), *_build.sanitizers()))
    folder = cache_dir() / f"{digest[:16]}-{sysconfig.get_config_var('SOABI')}{kind}"
    return folder if _complete(folder, digest) else _build_once(folder, digest, cuda)


def _wants_cuda() -> bool:
    # At first use nobody should wait for kernels that this torch cannot load.
    import torch

    return torch.version.cuda is not None


def _complete(folder: Path, digest: str | None) -> bool:
    record = _build.read_record(folder)
    files = record.get("files")
    if not isinstance(files, list) or (digest is not None and record.get("hash") != digest):
        return False
    return all((folder / str(name)).is_file() for name in files)


def _build_once(folder: Path, digest: str, cuda: bool) -> Path:
    import fcntl

    tools = _build.find_tools()
    reason = tools.missing()
    if reason is not None:
        raise _build.BuildError(reason)
    asked_at = time.time()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f"{folder.name}.lock").open("w")
    except OSError as error:
        raise _build.BuildError(f"cannot write to {folder.parent} ({error}); set SPARSEBERT_CACHE") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _complete(folder, digest):
            return folder
        note = folder.parent / f"{folder.name}.failed"
        if note.is_file() and note.stat().st_mtime >= asked_at:
            # Another process tried while this one waited for the lock; it would fail again.
            raise _build.BuildError(note.read_text())
        return _build_locked(folder, tools, note, cuda)


def _build_locked(folder: Path, tools: _build.Tools, note: Path, cuda: bool) -> Path:
    print(f"sparsebert: building its C++ extension, once, into {folder} (seconds to a minute)", file=sys.stderr)
    work = Path(tempfile.mkdtemp(prefix="build-", dir=folder.parent))
    try:
        _build.build(work / "out", work, tools, cuda=cuda)
        shutil.rmtree(folder, ignore_errors=True)
        (work / "out").rename(folder)
        note.unlink(missing_ok=True)
    except (OSError, _build.BuildError) as error:
        reason = str(error)
        log = work / "build.log"
        if log.is_file():
            kept = folder.parent / f"{folder.name}.log"
            shutil.copy2(log, kept)
            reason = reason.replace(str(log), str(kept))
        note.write_text(reason)
        raise _build.BuildError(reason) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder
