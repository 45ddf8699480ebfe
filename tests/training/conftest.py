"""A place for runs, and ways to break them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny import Workshop

pytest.register_assert_rewrite("training.breaks")  # before anything imports it

from training.breaks import Breaks  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices take longer on several threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A tiny BERT and a task of 48 sentences, for all tests of a file."""
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def breaks(monkeypatch: pytest.MonkeyPatch) -> Breaks:
    """Breaks the next runs where it is told to."""
    return Breaks(monkeypatch)
