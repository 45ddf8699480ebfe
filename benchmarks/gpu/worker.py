"""The process that measures: goes through the cells of its parts and reports every row as it comes.

A process of its own, for what may end one: an illegal access (after which CUDA answers no further call of the process),
a kernel that hangs, the end of the memory. `python -m benchmarks.gpu` starts it, reads its events, and starts another
behind the cell that ended it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["BROKEN", "PARTS", "main"]

PARTS = ("measure", "test", "kernels", "attention", "distill", "model", "train")
ROOT = Path(__file__).resolve().parents[2]
BROKEN = 75
"""Exit status: the device no longer answers this process."""

_LEAST = 15.0
"""Seconds: with fewer left no further cell is begun."""

Say = Callable[..., None]


def main() -> int:
    """Reads the plan from standard input, writes events to the file that it names."""
    plan = json.load(sys.stdin)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    with Path(plan["events"]).open("a", encoding="utf-8") as file:

        def say(event: str, **found: Any) -> None:
            print(json.dumps({"event": event, **found}), file=file, flush=True)

        return _work(plan, say)


def _end_with(parent: int) -> None:
    """Ends this process when the one that started it is gone: nobody would read on, and the GPU is to be free."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _work(plan: Mapping[str, Any], say: Say) -> int:
    begun = time.monotonic()
    import torch

    from benchmarks.gpu.bench import SEED, Bench, first_line
    from sparsebert.kernels._cost import Ceiling

    rehearsing = plan["rehearse"]
    if not rehearsing and not torch.cuda.is_available():
        say("refused", why=f"torch {torch.__version__} sees no CUDA device; --rehearse runs every cell on the CPU")
        return 2
    device = torch.device("cpu" if rehearsing else "cuda")
    if rehearsing:
        torch.set_num_threads(1)
    name = "rehearsal" if rehearsing else torch.cuda.get_device_name()
    # What torch's prototypes say of themselves would bury the rows.
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", ".*its Triton kernel could not be built")
    say("head", head={**_head(name, SEED), "backends": _backends(rehearsing)})
    for part in plan["parts"]:
        bench = Bench(device, lambda row, part=part: say("row", part=part, row=row), name=name)
        bench.deadline, bench.options = begun + plan["budget"], plan["options"]
        if rehearsing:
            bench.deadline = float("inf")
        else:
            # A part that was given its ceilings takes them: parts of one session share the denominators.
            given = plan["ceiling"] or _ceiling(bench)
            bench.ceiling = Ceiling(**given)
            say("ceiling", part=part, ceiling=given)
        try:
            cells = importlib.import_module(f"benchmarks.gpu.{part}").cells(bench)
        except Exception as error:
            if rehearsing:
                raise
            say("row", part=part, row={"kind": "red", "cell": part, "case": {}, "why": first_line(error)})
            say("done", part=part)
            continue
        cells = [cell for cell in cells if plan["options"]["only"] in cell.name]
        cells = _distinct(cells) if rehearsing else cells
        say("cells", part=part, names=[cell.name for cell in cells])
        for index, cell in enumerate(cells):
            if index < plan["skip"]:
                continue
            if bench.left() < _LEAST:
                for late in cells[index:]:
                    why = "the part's time was spent"
                    say("row", part=part, row={"kind": "skipped", "cell": late.name, "case": late.case(), "why": why})
                break
            say("begin", part=part, index=index, cell=cell.name, case=cell.case(), seconds=cell.seconds)
            bench.run(cell)
            say("end", part=part, index=index)
            if bench.broken():
                return BROKEN
        say("done", part=part)
    return 0


def _distinct(cells: list[Any]) -> list[Any]:
    """In the rehearsal: cells that only differ in sizes or numbers are one."""
    found: dict[Any, Any] = {}
    for cell in cells:
        settings = {**cell.settings, **cell.small, "targets": (), "state": "", "dtype": ""}
        found.setdefault((cell.run, repr(sorted(settings.items()))), cell)
    return list(found.values())


def _ceiling(bench: Any) -> dict[str, float]:
    """Measured at once, since no part `measure` of this session is at hand."""
    from benchmarks.gpu.measure import ceiling

    return ceiling(bench)


def _head(name: str, seed: int) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"device": name, "cuda": torch.version.cuda, "python": platform.python_version()}
    for package in ("torch", "triton", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except Exception:
            found[package] = "not installed"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["multiprocessors"] = properties.multi_processor_count
        found["cache, MiB"] = getattr(properties, "L2_cache_size", 0) >> 20
        found["memory, GiB"] = round(properties.total_memory / 2**30, 1)
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found["date"] = time.strftime("%Y-%m-%d", time.gmtime())
    found["commit"] = os.environ.get("SPARSEBERT_COMMIT") or _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    found["seed"] = seed
    return found


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else "unknown"


def _backends(rehearsing: bool) -> dict[str, str]:
    """Builds the extension where it is not built, and says what there is."""
    from sparsebert import _load

    wanted = ("cpu",) if rehearsing else ("cpu", "cuda")
    return {backend: _load.missing(backend) or "built" for backend in wanted}


if __name__ == "__main__":
    sys.exit(main())
