from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsebert import _load
from sparsebert.ops import varlen_attention
from sparsebert.ops._backend import OPS

shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
Within = Callable[..., None]
Tensors = tuple[Tensor, Tensor, Tensor]

LENGTHS = st.lists(st.sampled_from([0, 1, 2, 3, 5, 6, 7, 13, 16, 17, 31, 33, 64, 65, 79, 128, 145]), max_size=5)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def starts_of(lengths: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def make(
    lengths: Sequence[int],
    heads: int = 2,
    dim: int = 8,
    dtype: torch.dtype = torch.float32,
    layout: str = "own",
    seed: int = 0,
) -> Tensors:
    """q, k and v: each its own tensor, interleaved in one as a fused linear leaves them, or heads outside tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if layout == "fused":
        q, k, v = normal(tokens, 3 * heads * dim).view(tokens, 3, heads, dim).unbind(1)
        return q, k, v
    if layout == "heads first":
        q, k, v = normal(3, heads, tokens, dim).transpose(1, 2).unbind(0)
        return q, k, v
    if layout == "dim first":
        q, k, v = normal(3, dim, tokens, heads).permute(0, 2, 3, 1).unbind(0)
        return q, k, v
    q, k, v = normal(3, tokens, heads, dim).unbind(0)
    return q, k, v


def plain(tensors: Tensors, starts: Tensor, dtype: torch.dtype, scale: float | None = None) -> Tensor:
    """The promise, sequence by sequence, the eager way of transformers."""
    q, k, v = (x.to(dtype) for x in tensors)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    parts = [q[:0]]
    for begin, end in itertools.pairwise(starts.tolist()):
        query, key, value = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        shares = torch.softmax(query @ key.transpose(1, 2) * scale, dim=-1)
        parts.append((shares @ value).transpose(0, 1))
    return torch.cat(parts)


def check(within: Within, tensors: Tensors, starts: Tensor, scale: float | None = None) -> None:
    result = varlen_attention(*tensors, starts, scale=scale)
    assert result.dtype == tensors[0].dtype and result.is_contiguous()
    usual, exact = (plain(tensors, starts, dtype, scale) for dtype in (tensors[0].dtype, torch.float64))
    within(result, usual, exact, 2.0, tiny=True)


@shared
@given(
    lengths=LENGTHS,
    heads=st.integers(1, 3),
    dim=st.sampled_from([1, 2, 7, 8, 16, 31, 32, 33, 64, 80, 96, 130]),
    dtype=DTYPES,
    layout=st.sampled_from(["own", "fused", "heads first", "dim first"]),
    seed=st.integers(0, 999),
)
def test_within_torchs_own_error(
    backend: str,
    within: Within,
    lengths: list[int],
    heads: int,
    dim: int,
    dtype: torch.dtype,
    layout: str,
    seed: int,
) -> None:
    check(within, make(lengths, heads, dim, dtype, layout, seed), starts_of(lengths))


@shared
@given(lengths=LENGTHS, dim=st.sampled_from([5, 16, 64]), dtype=DTYPES, seed=st.integers(0, 999))
def test_on_every_instruction_set(
    isa: str, within: Within, lengths: list[int], dim: int, dtype: torch.dtype, seed: int
) -> None:
    check(within, make(lengths, 2, dim, dtype, "fused", seed), starts_of(lengths, torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1024, 4096])
def test_long_sequences(within: Within, length: int, dtype: torch.dtype) -> None:
    lengths = [length // 4, length]
    check(within, make(lengths, 1, 64, dtype), starts_of(lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_any_scale(backend: str, within: Within, scale: float, dtype: torch.dtype) -> None:
    check(within, make([19, 40], dtype=dtype), starts_of([19, 40]), scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e4, 1e15])
def test_large_scores_do_not_overflow(isa: str, size: float, dtype: torch.dtype) -> None:
    q, k, v = make([20], dtype=dtype)
    out = varlen_attention(q * size, k * size, v, starts_of([20]))
    # So far apart that each query takes the one key it fits best.
    best = torch.einsum("thd,shd->hts", q.double(), k.double()).argmax(-1)
    torch.testing.assert_close(out, torch.stack([v[best[head], head] for head in range(2)], 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_does_not_see_the_others(backend: str, dtype: torch.dtype) -> None:
    lengths = [7, 33, 0, 70]
    tensors = make(lengths, dtype=dtype)
    starts = starts_of(lengths)
    together = varlen_attention(*tensors, starts)
    for begin, end in itertools.pairwise(starts.tolist()):
        alone = varlen_attention(*(x[begin:end] for x in tensors), starts_of([end - begin]))
        assert torch.equal(together[begin:end], alone)
    for x in tensors:
        x[7:40] = float("nan")
    poisoned = varlen_attention(*tensors, starts)
    assert poisoned[7:40].isnan().all()
    assert torch.equal(poisoned[:7], together[:7]) and torch.equal(poisoned[40:], together[40:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_spreads_to_what_reads_it(backend: str, dtype: torch.dtype) -> None:
    starts = starts_of([20])
    q, k, v = make([20], dtype=dtype)
    q[3, 0, 0] = float("nan")
    out = varlen_attention(q, k, v, starts)
    assert out[3, 0].isnan().all() and out.isnan().sum() == 8
    q, k, v = make([20], dtype=dtype)
    v[3, 1, 5] = float("nan")
    out = varlen_attention(q, k, v, starts)
    assert out[:, 1, 5].isnan().all() and out.isnan().sum() == 20
    q, k, v = make([20], dtype=dtype)
    k[3, 1, 5] = float("inf")
    assert varlen_attention(q, k, v, starts)[:, 1].isnan().any()
    assert not varlen_attention(q, k, v, starts)[:, 0].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_nothing(threads: Callable[[int], None], dtype: torch.dtype) -> None:
    lengths = [300, 5, 129]
    tensors, starts = make(lengths, 3, 64, dtype), starts_of(lengths)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results += [varlen_attention(*tensors, starts) for _ in range(3)]
    assert all(torch.equal(results[0], result) for result in results)


@shared
@given(
    lengths=st.lists(st.integers(0, 20), max_size=4),
    dim=st.sampled_from([1, 4, 7]),
    dtype=DTYPES,
    seed=st.integers(0, 999),
)
def test_gradients_within_torchs_own_error(
    backend: str, within: Within, lengths: list[int], dim: int, dtype: torch.dtype, seed: int
) -> None:
    starts = starts_of(lengths)
    tensors = make(lengths, 2, dim, dtype, "fused", seed)
    above = make(lengths, 2, dim, dtype, seed=seed + 1)[0]

    def gradients(run: Callable[..., Tensor], wide: torch.dtype) -> tuple[Tensor, ...]:
        leaves = tuple(x.detach().to(wide).requires_grad_() for x in tensors)
        return torch.autograd.grad(run(leaves), leaves, above.to(wide), allow_unused=True)

    ours = gradients(lambda leaves: varlen_attention(*leaves, starts), dtype)
    usual = gradients(lambda leaves: plain(leaves, starts, dtype), dtype)
    exact = gradients(lambda leaves: plain(leaves, starts, torch.float64), torch.float64)
    assert all(result.dtype == dtype for result in ours)
    if sum(lengths):
        # Together: the terms of dq and dk, which may cancel, are of the size of dv.
        result, own, truth = (torch.cat([part.flatten() for part in parts]) for parts in (ours, usual, exact))
        within(result, own, truth, 3.0, tiny=True)


def test_in_float64_it_is_the_formula_and_passes_gradcheck() -> None:
    lengths = [3, 0, 5, 1]
    starts = starts_of(lengths)
    leaves = tuple(x.contiguous().requires_grad_() for x in make(lengths, dim=3, dtype=torch.float64))
    torch.testing.assert_close(varlen_attention(*leaves, starts), plain(leaves, starts, torch.float64))
    assert torch.autograd.gradcheck(lambda *x: varlen_attention(*x, starts), leaves)


def test_only_the_gradients_asked_for() -> None:
    q, k, v = make([6])
    q.requires_grad_()
    varlen_attention(q, k, v, starts_of([6])).sum().backward()
    assert q.grad is not None and k.grad is None and v.grad is None


def test_autocast_does_not_change_the_dtype_computed_in(backend: str) -> None:
    tensors, starts = make([9, 4]), starts_of([9, 4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = varlen_attention(*tensors, starts)
    assert torch.equal(under, varlen_attention(*tensors, starts))


def test_compiled_gradients_equal_eager_ones(backend: str) -> None:
    starts = starts_of([4, 9])
    leaves = tuple(x.detach().clone().requires_grad_() for x in make([4, 9]))

    def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(q, k, v, starts).square()

    results = []
    for run in (mixed, torch.compile(mixed, fullgraph=True, backend="aot_eager")):
        out = run(*leaves)
        results.append((out, *torch.autograd.grad(out.sum(), leaves)))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(eager, traced, rtol=1e-6, atol=1e-6)


def test_opcheck(backend: str) -> None:
    starts, cpu = starts_of([4, 0, 9]), torch.device("cpu")
    leaves = tuple(x.requires_grad_() for x in make([4, 0, 9], layout="own"))
    torch.library.opcheck(OPS["varlen_attention"].pick(cpu), (*leaves, starts, 0.5))
    fixed = (make([4, 0, 9], seed=1)[0], *(x.detach() for x in leaves), starts, 0.5)
    torch.library.opcheck(OPS["varlen_attention_backward"].pick(cpu), fixed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(5, 16)}, r"q: expected float \[tokens, heads, dim\], got .*\[5, 16\]"),
        ({"q": torch.zeros(5, 2, 8, dtype=torch.int64)}, "q: expected float"),
        ({"k": torch.zeros(4, 2, 8)}, r"k: expected torch.float32 \[5, 2, 8\] like q, got .*\[4, 2, 8\]"),
        ({"v": torch.zeros(5, 2, 8, dtype=torch.float64)}, "v: expected torch.float32"),
        ({"v": torch.zeros(5, 2, 8, device="meta")}, "v: expected on cpu like q, got meta"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, r"cu_seqlens: expected int32 or int64 \[B \+ 1\]"),
        ({"cu_seqlens": torch.tensor([[0, 5]])}, r"cu_seqlens: expected int32 or int64"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int64)}, r"cu_seqlens: expected int32 or int64"),
        ({"cu_seqlens": torch.tensor([0, 4])}, r"cu_seqlens: expected to ascend from 0 to 5.*got \[0, 4\]"),
        ({"cu_seqlens": torch.tensor([1, 5])}, "cu_seqlens: expected to ascend from 0 to 5"),
        ({"cu_seqlens": torch.tensor([0, 4, 3, 5])}, "cu_seqlens: expected to ascend from 0 to 5"),
        ({"cu_seqlens": torch.tensor([0, -1, 5])}, "cu_seqlens: expected to ascend from 0 to 5"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    q, k, v = make([5])
    with pytest.raises(ValueError, match=message):
        varlen_attention(**{"q": q, "k": k, "v": v, "cu_seqlens": starts_of([5]), **change})


@pytest.mark.skipif(_load.missing("cpu") is not None, reason="no compiled CPU kernels")
@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, torch.zeros(5, 2, 8, dtype=torch.float16)),
        (1, torch.zeros(4, 2, 8)),
        (1, torch.zeros(5, 2, 8, dtype=torch.bfloat16)),
        (2, torch.zeros(5, 2, 16)[..., ::2]),
        (2, torch.zeros(5, 16)),
        (3, torch.tensor([0, 6])),
        (3, torch.tensor([0, 9, 5])),
        (3, torch.tensor([-2, 5])),
        (3, torch.tensor([0.0, 5.0])),
        (3, torch.tensor([0, 0, 5, 5])[::3]),
        (3, torch.zeros(0, dtype=torch.int64)),
    ],
)
def test_a_direct_call_reads_nothing_out_of_bounds(place: int, value: Tensor) -> None:
    arguments: list[Any] = [*(x.contiguous() for x in make([5])), starts_of([5]), 0.5]
    arguments[place] = value
    with pytest.raises(RuntimeError, match=("q", "k", "v", "cu_seqlens")[place]):
        torch.ops.sparsebert.varlen_attention(*arguments)
