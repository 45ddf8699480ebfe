"""Memory of one variant, in a process of its own: what one variant leaves in the allocator would count as the next's.

Resident: what the process holds more than before the model was loaded, when the variant is built, has run once, and
everything else is freed. Peak: the same at the worst moment of two further forwards. Both are the system's numbers
(VmRSS and VmHWM, the latter reset before); on a GPU they are those of torch's allocator.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparsebert.reports.against import AGAINST, prepare
from sparsebert.reports.inputs import Case
from sparsebert.reports.subject import load_subject
from sparsebert.reports.variants import Variant, build, in_precision

__all__ = ["memory_of"]

_STATUS = Path("/proc/self/status")
_TIMEOUT = 900


def memory_of(job: dict[str, Any]) -> dict[str, Any]:
    """Bytes that a variant takes: `resident` and `peak`, or the `reason` why they are not known.

    Args:
        job: `where`, `pattern` and `sparsity` as `load_subject` takes them; `variant` (kind, way, precision) with the
            `layers` of a subnetwork; `case` (kind, lengths, width); `seed`, `threads` and `device`.
    """
    if job["device"] == "cpu" and not _STATUS.exists():
        return {"reason": "needs Linux's /proc"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "sparsebert.reports.memory"],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
        if done.returncode:
            said = done.stderr.strip().splitlines()
            return {"reason": said[-1] if said else f"the process ended with status {done.returncode}"}
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return {"reason": f"{type(error).__name__} in the process that measures it"}


def main() -> None:
    """Reads a job from standard input and prints its result."""
    from sparsebert.training.quiet import quiet

    job = json.load(sys.stdin)
    quiet()
    torch.set_num_threads(job["threads"])
    variant = Variant(*job["variant"])
    for package in AGAINST[variant.way][0] if variant.kind == "against" else ():
        importlib.import_module(package)
    _warm_up(job)
    _tidy()
    before = _resident(job["device"])
    with torch.inference_mode():
        run = _built(job, variant)
        run()
        _tidy()
        resident = _resident(job["device"]) - before
        reset = _reset_peak(job["device"])
        for _ in range(2):
            run()
        peak = _peak(job["device"]) - before
    found: dict[str, Any] = {"resident": resident, "peak": peak}
    if not reset:
        found["note"] = "the peak is that of building the variant too: it cannot be reset here"
    print(json.dumps(found))


def _built(job: dict[str, Any], variant: Variant) -> Callable[[], Any]:
    """The call; nothing but it outlives this function."""
    device = torch.device(job["device"])
    with torch.inference_mode(False), torch.no_grad():
        readout = load_subject(job["where"], job["pattern"], job["sparsity"]).readout.to(device)
        config = readout.base.config
        case = Case(job["case"]["kind"], tuple(job["case"]["lengths"]), job["case"]["width"])
        inputs = case.inputs(int(config.vocab_size), int(config.pad_token_id), job["seed"], device)
        against = variant.kind == "against"
        master = in_precision(readout, "fp32" if against and variant.way != "compile" else variant.precision)
        if against:
            return prepare(variant, master, inputs)
        # A copy: as long as one tensor of a memory-mapped file is in use, the rest of the file counts as resident.
        model = copy.deepcopy(build(variant, master, job["layers"])[0])
    return lambda: model(**inputs)


def _warm_up(job: dict[str, Any]) -> None:
    """Modules, libraries and thread pools, which every variant has."""
    device = torch.device(job["device"])
    load_subject(job["where"])
    for dtype in (torch.float32, torch.bfloat16):
        torch.nn.functional.linear(*(torch.zeros(64, 64, dtype=dtype, device=device) for _ in range(2)))


def _tidy() -> None:
    """Gives back what is free."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident(device: str) -> int:
    return torch.cuda.memory_allocated() if device.startswith("cuda") else _status("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else _status("VmHWM")


def _reset_peak(device: str) -> bool:
    """Whether the peak begins anew."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", _STATUS.read_text(encoding="utf-8"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    main()
