"""Every Triton kernel compiles for every architecture, keeps to its registers and fits the shared memory."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py") if not path.stem.startswith("_"))
# A program's shared memory: 164 and 228 KiB a multiprocessor, less the one that the system keeps.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.fixture(scope="module", params=OPS)
def rows(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    # A process of its own: in this one the kernels may be the interpreter's.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compiled", request.param, "--json", "--brief"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.stdout.startswith("["), done.stderr
    return list(json.loads(done.stdout))


def test_kernels_compile_without_spills(rows: list[dict[str, Any]]) -> None:
    # None at all: an op that is cuBLAS's.
    assert {row["sm"] for row in rows} >= {90, 100} or not rows
    for row in rows:
        assert "error" not in row, row
        assert row["spilled"] == 0, row
        assert row["shared"] <= SHARED_LIMIT[row["sm"]], row
