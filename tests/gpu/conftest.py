"""Triton's kernels: on the GPU where there is one, else in Triton's interpreter on the CPU's tensors."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """Where Triton's kernels run here."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton_backend(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The Triton kernels forced for the test; gives the device they run on."""
    monkeypatch.setenv("SPARSEBERT_BACKEND", "triton")
    yield device


def pytest_runtest_logfinish() -> None:
    """Ends a worker of pytest-xdist whose device no longer answers, so that one bad kernel fails one test.

    After an illegal access every later CUDA call of the process fails. The test's own report has been sent by now;
    xdist says that its worker crashed, and begins another.
    """
    if "PYTEST_XDIST_WORKER" in os.environ and _lost():
        os._exit(1)


def _lost() -> bool:
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
