"""Block-sparse attention's Triton kernels, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops import conftest as of_ops
from ops.block_attention import Case, check
from torch import Tensor

from sparsebert.ops import BlockLists, block_sparse_attention
from sparsebert.ops._backend import OPS

few = settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
Within = Callable[..., None]
within = of_ops.within


@pytest.mark.parametrize(
    "options",
    [
        {"block": (16, 16), "sizes": (32, 48), "partial": 0.0, "dtype": torch.float32},
        {"block": (16, 64), "sizes": (21, 150), "padding": True, "dtype": torch.bfloat16},
        {"block": (64, 16), "sizes": (65, 37), "shared": True, "dtype": torch.float32},
        {"block": (32, 32), "lengths": (5, 0, 40), "heads": 1, "dtype": torch.float16},
        {"block": (128, 128), "sizes": (150, 150), "heads": 1, "padding": True, "dtype": torch.bfloat16},
        {"block": (64, 32), "sizes": (70, 129), "heads": 1, "dim": 64, "dtype": torch.bfloat16},
        {"block": (32, 128), "sizes": (33, 40), "heads": 1, "dim": 64, "dtype": torch.float32},
        {"block": (32, 32), "sizes": (33, 70), "heads": 1, "dim": 128, "dtype": torch.float32},
        {"block": (64, 64), "lengths": (70, 3), "heads": 1, "dim": 128, "dtype": torch.bfloat16},
    ],
    ids=lambda options: "x".join(map(str, options["block"])),
)
def test_within_torchs_own_error(triton_backend: torch.device, within: Within, options: dict[str, Any]) -> None:
    check(Case(**{"batches": 1, **options}, device=triton_backend), within)


@few
@given(
    block=st.tuples(st.sampled_from([16, 32, 64]), st.sampled_from([16, 32, 64])),
    sizes=st.tuples(st.sampled_from([0, 1, 16, 33]), st.sampled_from([0, 1, 31, 64])),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    density=st.sampled_from([0.0, 0.5, 1.0]),
    padding=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_shape(
    triton_backend: torch.device,
    within: Within,
    block: tuple[int, int],
    sizes: tuple[int, int],
    dtype: torch.dtype,
    density: float,
    padding: bool,
    seed: int,
) -> None:
    own = {"block": block, "sizes": sizes, "dtype": dtype, "density": density, "seed": seed, "heads": 1}
    check(Case(**own, padding=padding and sizes[1] > 0, device=triton_backend), within)


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_any_scale(triton_backend: torch.device, scale: float) -> None:
    case = Case(batches=1, device=triton_backend)
    ours, promised = case.run(case.q, case.k, case.v, scale=scale), case.plain(case.q, case.k, case.v, scale)
    for own, plain in zip(ours, promised, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-5)


def everything(case: Case, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Result, log-sum-exp and gradients, from the ops themselves."""
    *tensors, above = operands
    lists = (case.lists.columns, case.lists.full_counts, case.lists.counts, case.lists.partial_bits)
    rest = (*lists, case.key_mask, case.cu_seqlens, case.lists.transposed(), list(case.block), 0.2)
    forward, backward = (OPS[f"block_sparse_attention{part}"].pick(case.device) for part in ("", "_backward"))
    out, lse = forward(*tensors, *rest)
    return out, lse, *backward(above, case.above_lse.contiguous(), *tensors, out, lse, *rest)


@pytest.mark.parametrize(
    "options",
    [
        {"sizes": (21, 41), "block": (16, 32), "padding": True, "heads": 1},
        {"sizes": (64, 32), "block": (32, 16), "heads": 1},
        {"lengths": (21, 0, 5), "block": (32, 16), "heads": 1},
        {"lengths": (20, 33), "block": (16, 64), "shared": True, "heads": 1},
    ],
)
def test_nothing_past_an_edge_is_read(triton_backend: torch.device, options: dict[str, Any]) -> None:
    """Operands cut out of larger tensors of NaN, along the tokens, give the same bits; so do padded keys of NaN."""
    case = Case(**options, device=triton_backend)
    operands = [case.q, case.k, case.v, case.above]
    clean = everything(case, operands)
    dim = 2 if case.lengths is None else 0
    around = []
    for x in operands:
        shape = [n + 64 * (i == dim) for i, n in enumerate(x.shape)]
        wider = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
        around.append(wider.narrow(dim, 32, x.shape[dim]).copy_(x))
    if case.key_mask is not None:
        for x in around[1:3]:
            x.masked_fill_(~case.key_mask[:, None, :, None], float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(clean, everything(case, around), strict=True))


def test_what_the_lists_leave_behind_is_ignored(triton_backend: torch.device) -> None:
    """Entries after a row's last block, and bits beyond the edges, may be anything."""
    case = Case(sizes=(40, 56), block=(16, 32), heads=1, batches=1, device=triton_backend)
    clean = everything(case, [case.q, case.k, case.v, case.above])
    lists = case.lists
    assert lists.partial_bits is not None
    after = torch.arange(lists.columns.shape[3], device=triton_backend) >= lists.counts[..., None]
    bits = lists.partial_bits.clone()
    bits[:, :, 2, :, 8:] = 255
    columns = torch.where(after, 10**6, lists.columns).int()
    case.lists = BlockLists(columns, lists.full_counts, lists.counts, bits, lists.block, lists.lengths).check()
    assert all(
        torch.equal(a, b) for a, b in zip(clean, everything(case, [case.q, case.k, case.v, case.above]), strict=True)
    )


@pytest.mark.parametrize(("dtype", "lengths"), [(torch.float32, None), (torch.bfloat16, (20, 0, 16))])
def test_the_same_bits_every_time(
    triton_backend: torch.device, dtype: torch.dtype, lengths: Sequence[int] | None
) -> None:
    case = Case(batches=1, heads=1, dtype=dtype, block=(32, 16), lengths=lengths, device=triton_backend)
    operands = [case.q, case.k, case.v, case.above]
    first = everything(case, operands)
    assert all(torch.equal(a, b) for a, b in zip(first, everything(case, operands), strict=True))


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_sequence_longer_than_the_lists_is_not_made_up(triton_backend: torch.device, blocks: int) -> None:
    """A GPU does not wait to see it: the rows that nobody computes are NaN."""
    case = Case(lengths=(40, 40), heads=1, block=(16, 16), density=1.0, partial=0.0, device=triton_backend)
    whole = torch.ones(1, 1, blocks, blocks, dtype=torch.bool)
    case.lists = BlockLists.from_block_map(whole, (16, 16)).to(triton_backend)
    out, lse, *gradients = everything(case, [case.q, case.k, case.v, case.above])
    rows = torch.arange(80, device=triton_backend) % 40 >= 16 * blocks
    for x in (out, lse.T[..., None], *gradients):
        assert bool(x[rows].isnan().all()) and not bool(x[~rows].isnan().any())


def test_starts_that_leave_the_tokens_are_not_followed(triton_backend: torch.device) -> None:
    """A GPU does not wait to refuse them: what lies before and behind the operands, here NaN, is not touched."""
    case = Case(lengths=(20, 20), heads=1, block=(16, 16), density=1.0, partial=0.0, device=triton_backend)
    case.lists = BlockLists.from_block_map(torch.ones(1, 1, 4, 4, dtype=torch.bool), (16, 16)).to(triton_backend)
    clean = everything(case, [case.q, case.k, case.v, case.above])
    around = []
    for x in (case.q, case.k, case.v, case.above):
        wider = torch.full((40 + 128, *x.shape[1:]), float("nan"), dtype=x.dtype, device=x.device)
        around.append(wider.narrow(0, 64, 40).copy_(x))
    case.cu_seqlens = torch.tensor([-30, 20, 60], dtype=torch.int32, device=triton_backend)
    assert all(torch.equal(a, b) for a, b in zip(clean, everything(case, around), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_lists_first_used_in_a_cuda_graph_serve_beside_it(triton_backend: torch.device) -> None:
    """What the graph is to compute of them is not taken for computed before it has run."""
    case = Case(device=triton_backend)
    expected = case.run(case.q, case.k, case.v)[0]
    case = Case(device=triton_backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.run(case.q, case.k, case.v)[0]
    assert torch.equal(case.run(case.q, case.k, case.v)[0], expected)
    graph.replay()
    assert torch.equal(captured, expected)


def test_order_changes_nothing(triton_backend: torch.device) -> None:
    case = Case(heads=1, device=triton_backend)
    lists = (case.lists.columns, case.lists.full_counts, case.lists.counts, case.lists.partial_bits)
    forward = OPS["block_sparse_attention"].pick(triton_backend)
    results = [
        forward(case.q, case.k, case.v, *lists, None, None, transposed, [16, 16], 0.2)
        for transposed in ([], case.lists.order(), case.lists.transposed())
    ]
    assert all(torch.equal(a, b) for result in results for a, b in zip(results[0], result, strict=True))


def test_rows_without_any_block_are_zero(triton_backend: torch.device) -> None:
    case = Case(device=triton_backend, density=0.0)
    out, lse = block_sparse_attention(case.q, case.k, case.v, case.lists, return_lse=True)
    assert bool((out == 0).all()) and bool((lse == -torch.inf).all())


def test_tiles_fit_their_blocks() -> None:
    triton = pytest.importorskip("sparsebert.kernels.block_sparse_attention")
    backward = pytest.importorskip("sparsebert.kernels.block_sparse_attention_backward")
    sizes = (16, 32, 64, 128)
    for dtype, dim, bits in itertools.product((torch.float32, torch.bfloat16), (32, 64, 128), (False, True)):
        for block in itertools.product(sizes, sizes):
            queries, keys, warps, _ = triton.tiles(block, dim, dtype, bits)
            (own, step, own_warps, _), (rows, columns, row_warps, _) = backward.tiles(block, dim, dtype, bits)
            assert block[0] % queries == 0 and block[0] % rows == 0 and block[1] % own == 0
            assert min(queries, keys, own, step, rows, columns) >= 16
            assert {warps, own_warps, row_warps} <= {1, 2, 4, 8}


def test_cost_is_what_one_counts_by_hand() -> None:
    triton = pytest.importorskip("sparsebert.kernels.block_sparse_attention")
    backward = pytest.importorskip("sparsebert.kernels.block_sparse_attention_backward")
    # One batch, two heads, 128 queries, 192 keys of 64 bfloat16: 2 x 3 blocks a head, 4 of them computed, 1 with bits.
    forward = triton.cost((1, 2, 128, 192), 64, (64, 64), blocks=8, partial=2)
    queries, keys = 2 * 128 * 64 * 2, 2 * 192 * 64 * 2
    lists = 8 * 4 + 2 * 2 * 3 * 4 + 2 * 64 * 8
    assert forward.read == queries + 2 * keys + lists and forward.written == queries + 2 * 128 * 4
    assert forward.flops == 8 * 64 * 64 * 64 * 2 * 2 and forward.launches == 1
    back = backward.cost((1, 2, 128, 192), 64, (64, 64), blocks=8, partial=2)
    assert back.launches == 3 and back.flops == 7 * 8 * 64 * 64 * 64 * 2 + 2 * 2 * 128 * 64
    assert back.written == queries + 2 * keys + 2 * 2 * 128 * 4
    walked = 2 * (queries + keys) + 2 * 2 * 128 * 4 + 2 * 64 * 8
    own = 4 * (8 + 2 + 3 * 2 * 3) + 4 * (8 + 3 * 2 * 2)
    assert back.read == 2 * queries + 2 * 128 * 4 + 2 * walked + own
