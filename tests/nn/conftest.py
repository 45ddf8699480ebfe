"""Makes `tests/tiny.py` importable however pytest imports this folder, keeps tiny products on one thread, and what is
measured out of the user's own file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparsebert.nn import remember

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices of 16 x 16 gain nothing from threads, which wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of measured choices for each test alone; the folder is made when something is remembered."""
    file = tmp_path / "measured" / "choices.json"
    monkeypatch.setattr(remember, "path", lambda: file)
    return file
