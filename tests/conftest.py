"""Settings every test shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    import tiny

# Where there is no GPU Triton's kernels run in its interpreter (tests/gpu). Triton reads this when it is first
# imported, which torch's compiler does too, so it is set before any test is.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A first example may wait for the compiled extension to be built; no test may depend on the clock.
settings.register_profile("sparsebert", deadline=None, max_examples=25, print_blob=True)
settings.load_profile("sparsebert")


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """The same numbers every time, whichever tests ran before: a budget of rounding errors is kept or is not."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices take longer on several threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> tiny.Workshop:
    """A folder with a pre-trained model and a task, shared by a module's tests; one thread."""
    import tiny

    from sparsebert.training.quiet import quiet

    quiet()
    return tiny.Workshop(tmp_path_factory.mktemp("workshop"))
