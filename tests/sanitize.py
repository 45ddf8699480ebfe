"""Run tests of the compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer; a finding ends the run.

    python tests/sanitize.py                            tests/ops, every instruction set of this machine
    python tests/sanitize.py tests/ops/test_bits.py -k nan    pytest's arguments

The kernels are built anew, with g++'s sanitizers, into a folder of their own of sparsebert's cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sparsebert import _build, _load

ROOT = Path(__file__).resolve().parents[1]
# libstdc++ too: the sanitizer must find its throw when it is loaded, before anything else is.
LIBRARIES = ("libasan.so", "libubsan.so", "libstdc++.so.6")
OPTIONS = {
    "SPARSEBERT_SANITIZE": "address,undefined",
    # Python and torch leave memory to the process's end. Sizes nobody has must fail as they do without the sanitizer.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=16384",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
}


def main(arguments: list[str]) -> int:
    """Run pytest with `arguments`, or over tests/ops, under the sanitizers; returns its exit status."""
    compiler = _build.find_tools().compiler
    if compiler is None:
        print("error: no C++ compiler: set CXX, or install g++", file=sys.stderr)
        return 2
    paths = [runtime_library(compiler, name) for name in LIBRARIES]
    for name, path in zip(LIBRARIES, paths, strict=True):
        if path is None:
            print(f"error: {compiler} has no {name}; set CXX to a g++ that has", file=sys.stderr)
            return 2
    os.environ.update(OPTIONS)
    try:
        _load.library_dir()  # built here: under LD_PRELOAD the compiler itself would be watched
    except _build.BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    environment = {**os.environ, "LD_PRELOAD": " ".join(map(str, paths))}
    command = [sys.executable, "-m", "pytest", "-p", "no:faulthandler", *(arguments or ["tests/ops"])]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def runtime_library(compiler: str, name: str) -> str | None:
    """Where the compiler keeps a runtime library; it repeats the bare name of one that it does not have."""
    command = [compiler, f"-print-file-name={name}"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return said if Path(said).is_absolute() else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
