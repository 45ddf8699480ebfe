"""The bitmap kernels' bodies, run on the host warp after warp: decoding, tiles, splits, edges and late copies."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsebert import _load
from sparsebert.formats import Bitmap
from sparsebert.ops._linear import ACTIVATIONS, linear_reference

NAN = float("nan")
shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
SHAPES = st.sampled_from([(1, 1), (16, 64), (17, 65), (40, 130), (33, 96), (5, 1100), (16, 2056), (90, 8), (65, 72)])


@pytest.fixture(scope="module")
def host() -> ModuleType:
    module = _load.host()
    if module is None or not hasattr(module, "emulate_bitmap_linear"):
        pytest.skip("the host module was not built")
    return module


def buffer(tensor: Tensor | None) -> Any:
    """The tensor's own memory; 16-bit floats as the words they are stored in."""
    if tensor is None:
        return None
    flat = tensor.detach().view(-1)
    return (flat.view(torch.int16) if flat.is_floating_point() else flat).numpy()


def aligned(tensor: Tensor, skip: int = 0) -> Tensor:
    """A copy whose memory begins `skip` elements after 16 bytes, with NaN on both sides."""
    size = tensor.numel()
    room = torch.full((size + 64,), NAN, dtype=tensor.dtype)
    first = -(room.data_ptr() // 2) % 8 + 8 + skip
    return room[first : first + size].copy_(tensor.view(-1)).view(tensor.shape)


def stored_of(shape: tuple[int, int], density: float, seed: int, dtype: torch.dtype = torch.bfloat16) -> Bitmap:
    torch.manual_seed(seed)
    stored = Bitmap.from_dense(torch.randn(shape).to(dtype), torch.rand(shape) < density)
    return stored.replaced(values=aligned(stored.values))


def index(stored: Bitmap) -> list[Any]:
    return [buffer(stored.values), buffer(stored.bits), buffer(stored.starts)]


@shared
@given(
    shape=SHAPES,
    density=st.sampled_from([0.0, 0.05, 0.2, 0.5, 1.0]),
    skip=st.sampled_from([0, 1]),
    backwards=st.booleans(),
    seed=st.integers(0, 999),
)
def test_every_lane_decodes_what_is_its_own(
    host: ModuleType, shape: tuple[int, int], density: float, skip: int, backwards: bool, seed: int
) -> None:
    stored = stored_of(shape, density, seed)
    dense = aligned(torch.full(shape, NAN, dtype=torch.bfloat16), skip)
    host.emulate_bitmap_tiles(*index(stored), buffer(dense), list(shape), False, backwards)
    assert torch.equal(dense, stored.to_dense())
    matrix = aligned(torch.randn(shape).bfloat16(), skip)
    gathered = stored.replaced(values=aligned(torch.full_like(stored.values, NAN)))
    host.emulate_bitmap_tiles(*index(gathered), buffer(matrix), list(shape), True, backwards)
    assert torch.equal(gathered.to_dense(), torch.where(stored.stored(), matrix, 0.0))


@shared
@given(
    shape=SHAPES,
    rows=st.sampled_from([1, 2, 8, 9, 16, 17, 33, 65, 70]),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    activation=st.sampled_from(ACTIVATIONS),
    processors=st.sampled_from([1, 2, 5, 132]),
    skip=st.sampled_from([0, 1]),
    flags=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 999),
)
def test_the_layer(
    host: ModuleType,
    shape: tuple[int, int],
    rows: int,
    density: float,
    activation: str,
    processors: int,
    skip: int,
    flags: tuple[bool, bool],
    seed: int,
) -> None:
    (n, k), stored = shape, stored_of(shape, density, seed)
    x = aligned(torch.randn(rows, k).bfloat16(), skip)
    bias = torch.randn(n).bfloat16() if flags[0] else None
    y = torch.full((rows, n), NAN, dtype=torch.bfloat16)
    host.emulate_bitmap_linear(
        buffer(x), *index(stored), buffer(bias), buffer(y), [rows, n, k], activation, processors, flags[1]
    )
    exact = linear_reference(
        x.double(), stored.to_dense().double(), None if bias is None else bias.double(), activation
    )
    terms = linear_reference(x.double().abs(), stored.to_dense().double().abs(), None, "none")
    assert ((y.double() - exact).abs() <= exact.abs() / 256 + 1e-6 * (1 + terms)).all()
    # Whatever the order of warps and lanes, the sums are the same.
    again = torch.full_like(y, NAN)
    host.emulate_bitmap_linear(
        buffer(x), *index(stored), buffer(bias), buffer(again), [rows, n, k], activation, processors, not flags[1]
    )
    assert torch.equal(y, again)


def test_starts_that_lie_read_nothing_else(host: ModuleType) -> None:
    """What is taken on trust may give wrong numbers, never an address outside."""
    stored = stored_of((40, 130), 0.3, 0)
    for wrong in (-5, 2**62, -(2**63), stored.nnz + 1):
        for place in range(stored.starts.numel()):
            starts = stored.starts.clone()
            starts[place] = wrong
            dense = torch.zeros(40, 130, dtype=torch.bfloat16)
            host.emulate_bitmap_tiles(*index(stored.replaced(starts=starts)), buffer(dense), [40, 130], False, False)
