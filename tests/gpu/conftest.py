"""Triton's kernels: on the GPU where there is one, else in Triton's interpreter on the CPU's tensors."""

from __future__ import annotations

import importlib.util
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
