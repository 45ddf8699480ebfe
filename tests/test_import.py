"""What importing the package costs, and what it offers."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sparsebert

HEAVY = ("torch", "transformers", "triton", "sklearn", "datasets", "pandas", "scipy", "rich")


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("import sparsebert, sparsebert.kernels, sparsebert.errors") == set()


def test_importing_the_ops_loads_torch_alone() -> None:
    assert loaded_after("import sparsebert.ops") & {"transformers", "triton", "sklearn", "datasets"} == set()


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'sparsebert' has no attribute 'nonsense'"):
        _ = sparsebert.nonsense


def test_every_public_name_resolves() -> None:
    for name in sparsebert.__all__:
        assert getattr(sparsebert, name) is not None and name in dir(sparsebert)
