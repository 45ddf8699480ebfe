"""The Triton kernels that make, turn and order lists of blocks: the same bits as their definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsebert.ops import BlockLists
from sparsebert.ops._backend import OPS
from sparsebert.ops.block_lists import (
    block_lists_reference,
    block_order_reference,
    transposed_block_lists_reference,
)

few = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = ("block_lists", "block_order", "transposed_block_lists")
POISON = -777
GUARD = 64


@pytest.fixture
def guarded(triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Whatever kernels allocate is full of POISON, and lies between guards; the result says that those still do."""
    held: list[tuple[Tensor, int]] = []
    real = torch.empty

    def empty(shape: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        entries = torch.Size(shape).numel()
        held.append((real(entries + 2 * GUARD, dtype=dtype, device=device).fill_(POISON), entries))
        return held[-1][0][GUARD : GUARD + entries].view(shape)

    def check() -> None:
        assert held
        for whole, entries in held:
            assert bool((whole[:GUARD] == POISON).all()) and bool((whole[GUARD + entries :] == POISON).all())

    for name in NAMES:
        module = pytest.importorskip(f"sparsebert.kernels.{name}")
        patched = type("Torch", (), {"empty": staticmethod(empty), "int32": torch.int32})
        patched.empty_like = staticmethod(lambda x: empty(x.shape, dtype=x.dtype, device=x.device))  # type: ignore[attr-defined]
        monkeypatch.setattr(module, "torch", patched)
    return check


def equal(ours: Any, promised: Any) -> bool:
    """Bit for bit, dtypes and layout too."""
    ours, promised = (x if isinstance(x, (list, tuple)) else [x] for x in (ours, promised))
    return len(ours) == len(promised) and all(
        a.dtype == b.dtype and a.is_contiguous() and torch.equal(a.cpu(), b.cpu())
        for a, b in zip(ours, promised, strict=True)
    )


def maps(shape: tuple[int, ...], share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Two maps of blocks on the CPU, which meet in some."""
    generator = torch.Generator().manual_seed(seed)
    full, partial = (torch.rand(shape, generator=generator) < share for _ in range(2))
    return full, partial


@few
@given(
    own=st.sampled_from([(1, 1), (2, 3), (0, 2)]),
    rows=st.sampled_from([0, 1, 5, 9]),
    width=st.sampled_from([0, 1, 16, 63, 64, 65]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    both=st.booleans(),
    seed=st.integers(0, 99),
)
def test_lists_of_maps(
    guarded: Callable[[], None],
    triton_backend: torch.device,
    own: tuple[int, int],
    rows: int,
    width: int,
    share: float,
    both: bool,
    seed: int,
) -> None:
    full, partial = maps((*own, rows, width), share, seed)
    given = (full, partial if both else None)
    body = OPS["block_lists"].pick(triton_backend)
    ours = body(*(None if x is None else x.to(triton_backend) for x in given))
    assert equal(ours, block_lists_reference(*given))
    guarded()


@pytest.mark.parametrize(("width", "share"), [(255, 0.4), (256, 1.0), (257, 0.4), (257, 0.0), (600, 0.4)])
def test_rows_longer_than_a_tile(
    guarded: Callable[[], None], triton_backend: torch.device, width: int, share: float
) -> None:
    full, partial = maps((1, 1, 2, width), share, width)
    ours = OPS["block_lists"].pick(triton_backend)(full.to(triton_backend), partial.to(triton_backend))
    promised = block_lists_reference(full, partial)
    assert equal(ours, promised)
    turned = OPS["transposed_block_lists"].pick(triton_backend)(*ours, width)
    assert equal(turned, transposed_block_lists_reference(*promised, width))
    guarded()


def test_maps_that_are_not_contiguous(triton_backend: torch.device) -> None:
    full, partial = maps((2, 3, 7, 9), 0.5, 0)
    body = OPS["block_lists"].pick(triton_backend)
    shared = full[:1].expand(2, -1, -1, -1).transpose(2, 3)
    ours = body(shared.to(triton_backend), partial.to(triton_backend).transpose(2, 3))
    assert equal(ours, block_lists_reference(shared, partial.transpose(2, 3)))


@few
@given(
    own=st.sampled_from([(1, 1), (2, 3), (0, 2)]),
    rows=st.sampled_from([0, 1, 7, 8, 70]),
    keys=st.sampled_from([0, 1, 17, 66]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_transposed_lists(
    guarded: Callable[[], None],
    triton_backend: torch.device,
    own: tuple[int, int],
    rows: int,
    keys: int,
    share: float,
    seed: int,
) -> None:
    lists = block_lists_reference(*maps((*own, rows, keys), share, seed))
    ours = OPS["transposed_block_lists"].pick(triton_backend)(*(x.to(triton_backend) for x in lists), keys)
    assert equal(ours, transposed_block_lists_reference(*lists, keys))
    guarded()


def test_lists_made_by_hand(guarded: Callable[[], None], triton_backend: torch.device) -> None:
    """Room for less than a whole row, anything behind the last block, and columns that are none."""
    columns = [[1, 4, 0], [3, 10**6, -5], [-1, 5, 2], [-(2**31), 2**31 - 1, 0], [0, 1, 2]]
    parts = (columns, [1, 0, 2, 1, 2], [3, 1, 3, 0, 9])
    listed, fulls, counts = (torch.tensor([[part]], dtype=torch.int32, device=triton_backend) for part in parts)
    ours = OPS["transposed_block_lists"].pick(triton_backend)(listed, fulls, counts, 5)
    assert equal(ours, transposed_block_lists_reference(listed, fulls, counts, 5))
    guarded()


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 128, 130])
@pytest.mark.parametrize("most", [1, 4, 1000])
def test_order_is_that_of_a_stable_sort(
    guarded: Callable[[], None], triton_backend: torch.device, rows: int, most: int
) -> None:
    counts = torch.randint(0, most, (2, 1, rows), dtype=torch.int32, generator=torch.Generator().manual_seed(rows))
    ours = OPS["block_order"].pick(triton_backend)(counts.to(triton_backend))
    assert equal(ours, block_order_reference(counts))
    guarded()


def test_lists_from_a_map_and_a_mask(triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to make them, with what a training asks of them."""
    generator = torch.Generator().manual_seed(0)
    block_map = torch.rand(2, 1, 5, 4, generator=generator) < 0.5
    mask = (torch.rand(1, 3, 70, 60, generator=generator) < 0.9) | (torch.arange(60) < 33)

    def made(device: torch.device) -> list[Tensor]:
        plain = BlockLists.from_block_map(block_map.to(device), (16, 16))
        within = BlockLists.from_block_map(block_map.to(device), (16, 16), mask.to(device))
        assert within.check().partial_bits is not None
        found = [x for lists in (plain, within) for x in (*lists._tensors().values(), *lists.transposed())]
        assert all(lists.order()[0] is lists.transposed()[0] for lists in (plain, within))
        return found

    ours = made(triton_backend)
    monkeypatch.setenv("SPARSEBERT_BACKEND", "reference")
    assert equal(ours, made(torch.device("cpu")))


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: Any) -> Any:
        self.launches += 1
        return self.kernel[grid]


def test_a_handful_of_launches(triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {"block_lists": "lists_kernel", "block_order": "order_kernel", "transposed_block_lists": "place_kernel"}
    modules = {name: pytest.importorskip(f"sparsebert.kernels.{name}") for name in kernels}
    counted = {name: Counted(getattr(modules[name], kernel)) for name, kernel in kernels.items()}
    for name, kernel in kernels.items():
        monkeypatch.setattr(modules[name], kernel, counted[name])
    BlockLists.from_block_map(torch.ones(1, 1, 4, 4, dtype=torch.bool, device=triton_backend)).transposed()
    costs = [modules["block_lists"].cost(4, 4), modules["block_order"].cost(1, 4)]
    costs.append(modules["transposed_block_lists"].cost(1, 4, 4, 16))
    assert sum(kernel.launches for kernel in counted.values()) == sum(cost.launches for cost in costs) == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_made_within_a_cuda_graph(triton_backend: torch.device) -> None:
    first, second = (x[0].to(triton_backend) for x in (maps((1, 2, 3, 9, 70), 0.4, seed) for seed in (0, 1)))

    def build(block_map: Tensor) -> list[Tensor]:
        lists = BlockLists.from_block_map(block_map, (16, 64))
        return [*lists._tensors().values(), *lists.transposed()]

    expected = [x.clone() for x in build(second)]
    static, graph = first.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = build(static)
    static.copy_(second)
    graph.replay()
    assert equal(made, expected)


def test_compiled_in_one_graph(triton_backend: torch.device) -> None:
    def build(block_map: Tensor) -> list[Tensor]:
        lists = BlockLists.from_block_map(block_map, (16, 64))
        return [*lists._tensors().values(), *lists.transposed()]

    block_map = maps((1, 2, 3, 9), 0.4, 0)[0].to(triton_backend)
    torch._dynamo.reset()
    assert equal(torch.compile(build, fullgraph=True, backend="aot_eager")(block_map), build(block_map))


def test_registered_as_torch_wants_it(triton_backend: torch.device) -> None:
    full, partial = (x.to(triton_backend) for x in maps((1, 2, 3, 9), 0.4, 0))
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    made = OPS["block_lists"].pick(triton_backend)(full, partial)
    calls = ((full, partial), (made[2],), (*made, 9))
    for name, arguments in zip(NAMES, calls, strict=True):
        torch.library.opcheck(OPS[name].pick(triton_backend), arguments, test_utils=checks)


@pytest.mark.parametrize("backend", ["cpu", "cuda", "reference", "triton"])
def test_any_backend_may_be_forced(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists are made on the CPU by their definition whatever is to compute with them, there or after a move."""
    monkeypatch.setenv("SPARSEBERT_BACKEND", backend)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    lists = BlockLists.from_block_map(torch.eye(3, dtype=torch.bool)[None, None], (16, 16))
    assert lists.columns[..., 0].tolist() == [[[0, 1, 2]]]
    assert lists.order()[0].tolist() == [[[0, 1, 2]]] and len(lists.transposed()) == 6
    assert BlockLists.from_block_map(torch.ones(1, 1, 3, 3, dtype=torch.bool, device="meta")).columns.is_meta


def test_compiled_tiles_are_those_launched(triton_backend: torch.device) -> None:
    lists = pytest.importorskip("sparsebert.kernels.block_lists")
    turned = pytest.importorskip("sparsebert.kernels.transposed_block_lists")
    launched = {lists.tiles(width) for width in range(1000)}
    for module in (lists, turned):
        compiled = [s.constants for s in module.specimens() if s.kernel is lists.lists_kernel]
        assert {(constants["ROWS"], constants["CHUNK"]) for constants in compiled} == launched


def test_cost_is_what_one_counts_by_hand(triton_backend: torch.device) -> None:
    lists = pytest.importorskip("sparsebert.kernels.block_lists")
    order = pytest.importorskip("sparsebert.kernels.block_order")
    turned = pytest.importorskip("sparsebert.kernels.transposed_block_lists")
    # 12 heads of 64 rows of 32 blocks, 16 of them listed.
    made = lists.cost(12 * 64, 32)
    assert (made.read, made.written, made.launches) == (12 * 64 * 32, 12 * 64 * (32 + 2) * 4, 1)
    assert lists.cost(12 * 64, 32, maps=2).read == 2 * made.read
    ordered = order.cost(12, 64)
    assert (ordered.read, ordered.written, ordered.launches) == (12 * 64 * 4, 12 * 64 * 4, 1)
    back = turned.cost(12, 64, 32, 12 * 64 * 16)
    whole, own = 12 * 64 * 32 * 4, 12 * 32 * 4
    assert back.read == (12 * 64 * 16 + 2 * 12 * 64) * 4 + whole + own
    assert back.written == whole + 12 * 64 * 16 * 4 + 2 * whole + 2 * own + own and back.launches == 3
