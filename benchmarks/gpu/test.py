"""Part `test`: the project's tests on this GPU, compute-sanitizer over every kernel, and more than 2^31 elements."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.gpu import sanitize
from benchmarks.gpu.bench import Bench, Cell, Red, Skip, relative_error
from benchmarks.gpu.worker import BROKEN
from sparsebert import ops
from sparsebert.formats import parse_format
from sparsebert.ops._backend import OPS

__all__ = ["cells"]

ROOT = Path(__file__).resolve().parents[2]
# They compile without a GPU, for minutes, and have been run where the code was written.
COMPILING = "tests/gpu/test_compile.py"
BF16 = torch.bfloat16
_WORKERS = 12


def cells(bench: Bench) -> list[Cell]:
    """What shows most in the least time first; each is given what is left of the part's time."""
    hour = 3600.0
    tiny = {"words": ("tests/ops/test_bits.py", "--collect-only"), "share": 1.0}
    return [
        Cell("every kernel once", _called, {}, {}, (), 240.0),
        Cell("pytest tests/gpu", _pytest, {"words": ("tests/gpu", f"--ignore={COMPILING}"), "share": 0.55},
             tiny, (), hour),
        Cell("memcheck", _sanitizer, {"tool": "memcheck"}, {}, (), hour),
        Cell("racecheck", _sanitizer, {"tool": "racecheck"}, {}, (), hour),
        Cell("2^31 elements: masked_weight", _big_weight, {"rows": 65540}, {"rows": 40, "columns": 16},
             ("masked_weight",)),
        Cell("2^31 elements: soft_cross_entropy", _big_logits, {"rows": 70400}, {"rows": 12, "classes": 20},
             ("soft_cross_entropy",)),
        Cell("2^31 elements: block_sparse_linear", _big_linear, {"rows": 700_001}, {"rows": 9, "shape": (32, 64)},
             ("block_sparse_linear",)),
        Cell("pytest tests/ops", _pytest, {"words": ("tests/ops",), "share": 1.0}, tiny, (), hour),
    ]  # fmt: skip


def _ended(command: Sequence[str], seconds: float, **environment: str) -> tuple[int | None, str]:
    """Exit status (None: ended here when its time was spent) and output of a command."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, **environment}, start_new_session=True,
    )  # fmt: skip
    try:
        output = process.communicate(timeout=seconds)[0]
        return process.returncode, output
    except subprocess.TimeoutExpired:
        # Its own process group, and so its children too: pytest's workers, what a sanitizer watches.
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]


def _pytest(bench: Bench, words: tuple[str, ...], share: float) -> None:
    """Runs pytest; what failed is named, and the row is red."""
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    missing = [name for name in ("hypothesis",) if importlib.util.find_spec(name) is None]
    if missing:
        raise Skip(f"{', '.join(missing)} is not installed")
    # A line for every test as it ends: what failed is known though the time runs out.
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=line", *words]
    threads = os.cpu_count() or 1
    if importlib.util.find_spec("xdist") is not None and bench.cuda:
        # Compiling the kernels is most of it, and that is the processor's work.
        command += ["-n", str(min(_WORKERS, threads))]
    if importlib.util.find_spec("pytest_timeout") is not None and bench.cuda:
        command += ["--timeout=150", "--timeout-method=thread"]
    # It ends before this process may be ended, or nobody would end it.
    seconds = min(share * (bench.left() - 15.0), bench.left() - 8.0) if bench.cuda else 300.0
    if seconds < 20.0:
        raise Skip("the part's time was spent")
    start = time.perf_counter()
    status, output = _ended(command, seconds, OMP_NUM_THREADS=str(max(1, threads // _WORKERS)))
    lines = output.strip().splitlines()
    last = lines[-1] if lines else "no output"
    failed = _failed(lines)
    facts = {"result": re.sub(r"^=+ | =+$", "", last), "seconds": round(time.perf_counter() - start, 1)}
    case = {"": " ".join(words)}
    if status is None:
        passed = sum(" PASSED" in line for line in lines)
        result = f"ended after {seconds:.0f} s: {len(failed)} failed, {passed} passed"
        bench.facts(case, {**facts, "result": result}, notes=failed[:40])
        if failed:
            raise Red(f"{len(failed)} failed before the time was spent: {failed[0]}")
        return
    bench.facts(case, facts, notes=failed[:40])
    if status != 0:
        raise Red(f"pytest ended with status {status}: {failed[0] if failed else last}")


def _failed(lines: Sequence[str]) -> list[str]:
    """The tests that failed, with the reason where pytest came to say it: "path::name - reason"."""
    found: dict[str, str] = {}
    for line in lines:
        # While it runs "[gw3] [ 40%] FAILED path::name" or "path::name FAILED [ 40%]"; at the end "FAILED path - why".
        run = re.match(r"\[gw\d+\] \[ *\d+%\] (?:FAILED|ERROR) (\S.*)|(\S.*) (?:FAILED|ERROR) +\[ *\d+%\]", line)
        told = re.match(r"(?:FAILED|ERROR) (\S+?::.*?|\S+)(?: - (.*))?$", line)
        if run:
            found.setdefault((run[1] or run[2]).strip(), "")
        elif told:
            # The first: a worker that was ended after a test names that test again.
            found[told[1].strip()] = found.get(told[1].strip()) or told[2] or ""
    return [f"{name} - {why}" if why else name for name, why in found.items()]


def _called(bench: Bench) -> None:
    """Without a sanitizer: what is slow below it is found here, and compiled for it."""
    if bench.cuda:
        names = sorted({*sanitize.CALLS, *OPS})
        shares = [names[place::_WORKERS] for place in range(_WORKERS)]
        seconds = min(220.0, bench.left() - 15.0)
        # Compiling is most of it, so several at a time.
        with ThreadPoolExecutor(_WORKERS) as pool:
            parts = list(pool.map(lambda share: _apart(share, time.monotonic() + seconds), filter(None, shares)))
        found = {name: became for part in parts for name, became in part.items()}
    else:
        found = sanitize.run(bench.device)
    bench.facts({}, _grouped(found))
    failed = [f"{name}: {became}" for name, became in found.items() if became.startswith("failed")]
    if failed:
        raise Red("; ".join(failed))


def _apart(names: Sequence[str], end: float) -> dict[str, str]:
    """What became of the calls of some ops, in a process of their own; in another behind one that ended it."""
    found: dict[str, str] = {}
    while rest := [name for name in names if name not in found]:
        if end - time.monotonic() < 10.0:
            return found | dict.fromkeys(rest, "not come to: the time was spent")
        command = [sys.executable, "-m", "benchmarks.gpu.sanitize", *rest]
        status, output = _ended(command, end - time.monotonic())
        told = {name: became for name, became in re.findall(r"^(\w+): (.+)$", output, re.MULTILINE) if name in rest}
        found |= told
        silent = [name for name in rest if name not in told]
        if silent and (status is None or status != BROKEN):
            why = "the time ran out in it" if status is None else f"the process ended with status {status}"
            found[silent[0]] = f"failed: {why}: {' '.join(output.split())[-200:]}"
    return found


def _grouped(found: dict[str, str]) -> dict[str, str]:
    return {why: ", ".join(name for name, of in found.items() if of == why) for why in dict.fromkeys(found.values())}


def _sanitizer(bench: Bench, tool: str) -> None:
    """compute-sanitizer over `benchmarks.gpu.sanitize`."""
    path = shutil.which("compute-sanitizer") or _in_toolkit()
    if path is None:
        raise Skip("compute-sanitizer is neither on the PATH nor in CUDA's folder")
    if not bench.cuda:
        raise Skip("a rehearsal has no GPU to watch")
    command = [path, "--tool", tool, "--error-exitcode", "86", sys.executable, "-m", "benchmarks.gpu.sanitize"]
    seconds = min(200.0, 0.6 * (bench.left() - 20.0))
    if seconds < 20.0:
        raise Skip("the part's time was spent")
    start = time.perf_counter()
    # Without torch's cache every tensor is an allocation of its own, whose bounds are watched.
    status, output = _ended(command, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    errors = [line for line in output.splitlines() if line.startswith("========= ") and "COPYRIGHT" not in line]
    called = re.findall(r"^(\w+): called", output, re.MULTILINE)
    facts = {"called": ", ".join(called) or "nothing", "seconds": round(time.perf_counter() - start, 1)}
    if status is None:
        facts["ended"] = f"after {seconds:.0f} s, in the call that follows the last one named"
    bench.facts({"tool": tool}, facts, notes=errors[:20] if status not in (0, None) else [])
    if status not in (0, None):
        raise Red(f"{tool} ended with status {status}: {errors[0] if errors else output.strip()[-200:]}")


def _in_toolkit() -> str | None:
    folders = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", *map(str, Path("/usr/local").glob("cuda-*"))]
    paths = (Path(folder) / "bin" / "compute-sanitizer" for folder in folders if folder)
    return next((str(path) for path in paths if path.is_file()), None)


def _gate(bench: Bench, case: dict[str, object], error: float, bound: float) -> None:
    if not error <= bound:
        raise Red(f"wrong result in the last rows: {error:.3g} off, may be {bound:.3g}")
    bench.facts(case, {"error": error})


def _big_weight(bench: Bench, rows: int, columns: int = 32768) -> None:
    """W·mask of more than 2^31 elements; the last rows lie past what 32 bits address."""
    device = bench.device
    weight = torch.randn(64, columns, device=device).to(BF16).repeat(rows // 64 + 1, 1)[:rows].contiguous()
    bits = torch.randint(0, 256, (rows * columns // 8,), device=device, dtype=torch.uint8)
    out = ops.masked_weight(weight, bits)
    tail = slice(rows - 8, rows)
    kept = ops.unpack_bits(bits[-columns:], (8, columns))
    wanted = torch.where(kept, weight[tail], torch.zeros((), dtype=BF16, device=device))
    _gate(bench, {"elements": rows * columns}, relative_error(out[tail], wanted), 0.0)


def _big_logits(bench: Bench, rows: int, classes: int = 30522) -> None:
    """Logits of more than 2^31 elements: the gradient in the last rows."""
    student, teacher = _halves(bench, rows, classes), _halves(bench, rows, classes)
    student.requires_grad_()
    loss = ops.soft_cross_entropy(student, teacher, temperature=2.0)
    (gradient,) = torch.autograd.grad(loss, student)
    s, t = (x.detach()[-5:].double() for x in (student, teacher))
    wanted = (torch.softmax(s / 2, -1) - torch.softmax(t / 2, -1)) * (2 / rows)
    _gate(bench, {"elements": rows * classes}, relative_error(gradient[-5:], wanted), 0.01)


def _big_linear(bench: Bench, rows: int, shape: tuple[int, int] = (3072, 768)) -> None:
    """So many tokens that the result has more than 2^31 elements."""
    n, k = shape
    side = 64 if bench.cuda else 16
    kind, options = parse_format(f"blocks:{side}x{side}")
    weight = torch.randn(n, k, device=bench.device).to(BF16)
    weight[:side] = 0
    stored = kind.from_dense(weight, **options)
    x = _halves(bench, rows, k)
    y = stored.linear(x)
    _gate(bench, {"elements": rows * n}, relative_error(y[-5:], x[-5:].double() @ weight.double().t()), 0.02)


def _halves(bench: Bench, rows: int, columns: int) -> torch.Tensor:
    """Random bfloat16 `[rows, columns]`, made without a copy in float32."""
    return torch.empty(rows, columns, device=bench.device, dtype=BF16).normal_()
