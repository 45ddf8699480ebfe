"""Attention without padding: the Triton kernel."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops import conftest as of_ops
from ops import test_varlen_attention as on_cpu
from torch import Tensor

from sparsebert.ops import varlen_attention
from sparsebert.ops._backend import OPS

few = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Within = Callable[..., None]
within = of_ops.within


def make(
    device: torch.device, lengths: Sequence[int], *settings: Any, **more: Any
) -> tuple[tuple[Tensor, ...], Tensor]:
    """q, k and v, and where the sequences begin."""
    tensors = on_cpu.make(lengths, *settings, **more)
    return tuple(x.to(device) for x in tensors), on_cpu.starts_of(lengths).to(device)


def body(device: torch.device) -> Any:
    """The op as Triton serves it."""
    found = OPS["varlen_attention"].pick(device)
    assert found.namespace == "sparsebert_triton"
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "dim"), [([40, 0, 1, 65], 32), ([150], 64), ([7, 20, 16, 33, 0], 64), ([1, 70], 128)]
)
def test_within_torchs_own_error(
    triton_backend: torch.device, within: Within, lengths: list[int], dim: int, dtype: torch.dtype
) -> None:
    on_cpu.check(within, *make(triton_backend, lengths, 1, dim, dtype, "fused"))


@few
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 31, 32, 33, 64, 65]), max_size=5),
    heads=st.integers(1, 3),
    dim=st.sampled_from([1, 7, 16, 32, 40, 64]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["own", "fused", "heads first", "dim first"]),
    seed=st.integers(0, 999),
)
def test_any_shape(
    triton_backend: torch.device,
    within: Within,
    lengths: list[int],
    heads: int,
    dim: int,
    dtype: torch.dtype,
    layout: str,
    seed: int,
) -> None:
    on_cpu.check(within, *make(triton_backend, lengths, heads, dim, dtype, layout, seed))


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_any_scale(triton_backend: torch.device, within: Within, scale: float) -> None:
    on_cpu.check(within, *make(triton_backend, [19, 40]), scale)


@pytest.mark.parametrize("lengths", [[2, 0, 3], [0, 0, 0, 3], [2, 0, 1, 0, 4], [0] * 8 + [5]])
def test_more_sequences_than_are_read_at_a_time(
    triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch, lengths: list[int]
) -> None:
    """The sequence of a tile is found wherever it is, in lengths of either dtype."""
    module = importlib.import_module("sparsebert.kernels.varlen_attention")
    monkeypatch.setattr(module, "_SPAN", 4)
    tensors, starts = make(triton_backend, lengths, 1)
    expected = on_cpu.plain(tensors, starts, torch.float64).float()
    for given_starts in (starts, starts.int()):
        torch.testing.assert_close(varlen_attention(*tensors, given_starts), expected, rtol=1e-4, atol=1e-5)


def test_slots_are_enough_for_any_lengths() -> None:
    from sparsebert.kernels.varlen_attention import slots

    generator = torch.Generator().manual_seed(0)
    for tile in (32, 64, 128):
        for _ in range(200):
            lengths = torch.randint(0, 3 * tile, (6,), generator=generator)
            lengths[torch.rand(6, generator=generator) < 0.3] = 0
            starts = on_cpu.starts_of(lengths.tolist()).tolist()
            first = [start // tile + i for i, start in enumerate(starts)]
            needed = [-(-length // tile) for length in lengths.tolist()]
            own = [after - before for before, after in itertools.pairwise(first)]
            assert all(want <= have <= want + 1 for want, have in zip(needed, own, strict=True))
            assert first[-1] == slots(starts[-1], 6, tile)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_past_an_edge_is_read(triton_backend: torch.device, dtype: torch.dtype) -> None:
    """Operands cut out of larger tensors of NaN, along tokens and width, give the same bits."""
    tensors, starts = make(triton_backend, [21, 0, 40, 5], 2, 32, dtype)
    clean = varlen_attention(*tensors, starts)
    around = []
    for x in tensors:
        wider = torch.full((66 + 64, 2, 64), float("nan"), dtype=dtype, device=triton_backend)
        around.append(wider[32:98, :, 16:48].copy_(x))
    assert torch.equal(clean, varlen_attention(*around, starts))


def test_a_sequence_does_not_see_the_others(triton_backend: torch.device) -> None:
    tensors, starts = make(triton_backend, [7, 33, 0, 70])
    together = varlen_attention(*tensors, starts)
    for x in tensors:
        x[7:40] = float("nan")
    poisoned = varlen_attention(*tensors, starts)
    assert poisoned[7:40].isnan().all()
    assert torch.equal(poisoned[:7], together[:7]) and torch.equal(poisoned[40:], together[40:])


def test_a_nan_spreads_to_what_reads_it(triton_backend: torch.device) -> None:
    (q, k, v), starts = make(triton_backend, [20])
    q[3, 0, 0] = float("nan")
    out = varlen_attention(q, k, v, starts)
    assert out[3, 0].isnan().all() and out.isnan().sum() == 8
    (q, k, v), starts = make(triton_backend, [20])
    v[3, 1, 5] = float("nan")
    out = varlen_attention(q, k, v, starts)
    assert out[:, 1, 5].isnan().all() and out.isnan().sum() == 20


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_every_time(triton_backend: torch.device, dtype: torch.dtype) -> None:
    tensors, starts = make(triton_backend, [20, 0, 49], 2, 32, dtype)
    assert torch.equal(varlen_attention(*tensors, starts), varlen_attention(*tensors, starts))


@pytest.mark.parametrize(
    "starts", [[0, 4, 7], [1, 4, 9], [0, 9, 4, 9], [0, -1, 9], [0, 4, 90], [0, 2**40, 9], [9], [0, 9, 9, 10]]
)
def test_lengths_that_fit_no_tokens_give_nan(triton_backend: torch.device, starts: list[int]) -> None:
    """A GPU does not wait to look at them; nothing past the tokens is read, and nothing looks like a result."""
    tensors, _ = make(triton_backend, [9])
    out = body(triton_backend)(*tensors, torch.tensor(starts, device=triton_backend), 0.5)
    assert out.isnan().all()


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_no_tokens(triton_backend: torch.device, lengths: list[int]) -> None:
    tensors, starts = make(triton_backend, lengths)
    assert varlen_attention(*tensors, starts).shape == (0, 2, 8)


def test_no_heads(triton_backend: torch.device) -> None:
    none = torch.zeros(5, 0, 32, device=triton_backend)
    assert varlen_attention(none, none, none, torch.tensor([0, 5], device=triton_backend)).shape == (5, 0, 32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_within_torchs_own_error(triton_backend: torch.device, within: Within, dtype: torch.dtype) -> None:
    tensors, starts = make(triton_backend, [5, 0, 17], 2, 8, dtype, "fused")
    above = make(triton_backend, [5, 0, 17], 2, 8, dtype, seed=1)[0][0]

    def gradients(run: Callable[..., Tensor], wide: torch.dtype) -> Tensor:
        leaves = tuple(x.detach().to(wide).requires_grad_() for x in tensors)
        return torch.cat([g.flatten() for g in torch.autograd.grad(run(leaves), leaves, above.to(wide))])

    ours = gradients(lambda leaves: varlen_attention(*leaves, starts), dtype)
    usual = gradients(lambda leaves: on_cpu.plain(leaves, starts, dtype), dtype)
    exact = gradients(lambda leaves: on_cpu.plain(leaves, starts, torch.float64), torch.float64)
    within(ours, usual, exact, 3.0, tiny=True)


def test_opcheck(triton_backend: torch.device) -> None:
    tensors, starts = make(triton_backend, [4, 0, 9])
    leaves = [x.contiguous().requires_grad_() for x in tensors]
    torch.library.opcheck(body(triton_backend), (*leaves, starts, 0.5))


def test_compiles_in_one_piece(triton_backend: torch.device) -> None:
    tensors, starts = make(triton_backend, [4, 9])
    traced = torch.compile(varlen_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(*tensors, starts), varlen_attention(*tensors, starts))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("lengths", [[40, 0, 20], [1, 58, 1]])
def test_in_a_graph_other_lengths_on_replay(triton_backend: torch.device, lengths: list[int]) -> None:
    tensors, starts = make(triton_backend, [20, 20, 20], dim=64, dtype=torch.bfloat16)
    varlen_attention(*tensors, starts)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = varlen_attention(*tensors, starts)
    others = on_cpu.starts_of(lengths).to(triton_backend)
    starts.copy_(others)
    graph.replay()
    assert torch.equal(out, varlen_attention(*tensors, others))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_nothing_waits_for_the_gpu(triton_backend: torch.device) -> None:
    tensors, starts = make(triton_backend, [20, 30], dim=64, dtype=torch.bfloat16)
    varlen_attention(*tensors, starts)
    torch.cuda.set_sync_debug_mode("error")
    try:
        varlen_attention(*tensors, starts)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tiles_fit_the_tensor_cores() -> None:
    from sparsebert.kernels.varlen_attention import padded, tiles

    for mean, dim, dtype in itertools.product((0, 1, 32, 33, 191, 192, 5000), (32, 64, 128), DTYPES):
        rows, keys, warps, stages = tiles(mean, dim, dtype)
        assert rows >= 16 and keys >= 16 and warps in (2, 4, 8) and stages >= 1
        assert rows & (rows - 1) == 0 and keys & (keys - 1) == 0
    assert [padded(dim) for dim in (1, 32, 33, 80, 128)] == [32, 32, 64, 128, 128]


def test_every_tile_is_among_the_specimens() -> None:
    from sparsebert.kernels.varlen_attention import specimens, tiles

    compiled = {
        (s.constants["D"], s.signature["q"], s.constants["TQ"], s.constants["TK"], s.warps, s.stages)
        for s in specimens()
    }
    for mean, dim in itertools.product((1, 33, 191, 192, 5000), (32, 64, 128)):
        assert (dim, "*bf16", *tiles(mean, dim, torch.bfloat16)) in compiled
        assert (dim, "*fp32", *tiles(mean, dim, torch.float32)) in compiled


def test_cost_is_what_one_counts_by_hand() -> None:
    from sparsebert.kernels.varlen_attention import cost

    # 300 and 100 tokens, 200 on average: tiles of 128 queries, 64 keys at a time. 3 x 128 queries see 5 x 64 keys,
    # 128 see 2 x 64. Two products of 64, two FLOPs each, in 12 heads.
    found = cost([300, 100], 12, 64)
    size = 400 * 12 * 64 * 2
    assert found.read == 3 * size + 3 * 8 and found.written == size and found.launches == 1
    assert found.flops == 12 * (384 * 320 + 128 * 128) * 64 * 2 * 2
    # Heads of 40 are computed at 64; short ones in float32 by tiles of 32 queries and 16 keys.
    narrow = cost([20], 2, 40, bytes_each=4)
    assert narrow.flops == 2 * 32 * 32 * 64 * 2 * 2 and narrow.written == 20 * 2 * 64 * 4
