from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.block_attention import Case, Tensors, check
from torch import Tensor

from sparsebert.ops import BlockLists, block_sparse_attention
from sparsebert.ops._backend import OPS

shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
Within = Callable[..., None]
NAMES = ("block_sparse_attention", "block_sparse_attention_backward")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend of this machine in turn, forced for the test."""
    reasons = [reason for reason in (OPS[name].missing(request.param) for name in NAMES) if reason]
    if reasons:
        pytest.skip(reasons[0])
    monkeypatch.setenv("SPARSEBERT_BACKEND", request.param)
    return str(request.param)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    block=st.tuples(st.sampled_from([16, 32, 64, 128]), st.sampled_from([16, 32, 64, 128])),
    sizes=st.tuples(st.sampled_from([0, 1, 16, 65, 130]), st.sampled_from([0, 1, 31, 64, 150])),
    dim=st.sampled_from([32, 64, 128]),
    dtype=DTYPES,
    own=st.booleans(),
    density=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    partial=st.sampled_from([0.0, 0.5, 1.0]),
    padding=st.booleans(),
    seed=st.integers(0, 999),
)
def test_within_torchs_own_error(
    backend: str,
    within: Within,
    block: tuple[int, int],
    sizes: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    own: bool,
    density: float,
    partial: float,
    padding: bool,
    seed: int,
) -> None:
    check(
        Case(
            block=block,
            sizes=sizes,
            dim=dim,
            dtype=dtype,
            shared=not own,
            density=density,
            partial=partial,
            padding=padding and sizes[1] > 0,
            seed=seed,
        ),
        within,
    )


@shared
@given(
    lengths=st.lists(st.sampled_from([0, 1, 15, 16, 17, 64, 100]), max_size=4),
    block=st.tuples(st.sampled_from([16, 64]), st.sampled_from([16, 32, 128])),
    dtype=DTYPES,
    own=st.booleans(),
    density=st.sampled_from([0.3, 1.0]),
    seed=st.integers(0, 999),
)
def test_without_padding_within_torchs_own_error(
    backend: str,
    within: Within,
    lengths: list[int],
    block: tuple[int, int],
    dtype: torch.dtype,
    own: bool,
    density: float,
    seed: int,
) -> None:
    check(Case(block=block, lengths=lengths, dtype=dtype, shared=not own, density=density, seed=seed), within)


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_any_scale(backend: str, scale: float) -> None:
    case = Case()
    ours, promised = case.run(case.q, case.k, case.v, scale=scale), case.plain(case.q, case.k, case.v, scale)
    for own, plain in zip(ours, promised, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-5)


def test_every_block_is_dense_attention(backend: str) -> None:
    case = Case(density=1.0, partial=0.0)
    dense = torch.nn.functional.scaled_dot_product_attention(case.q, case.k, case.v)
    torch.testing.assert_close(block_sparse_attention(case.q, case.k, case.v, case.lists), dense)


def test_the_result_joins_heads_without_a_copy(backend: str) -> None:
    case = Case()
    q, k, v = (x.contiguous().requires_grad_() for x in (case.q, case.k, case.v))
    out = case.run(q, k, v)[0]
    assert out.transpose(1, 2).is_contiguous()
    out.sum().backward()
    assert q.grad is not None and q.grad.shape == q.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_left_out_is_not_seen(backend: str, dtype: torch.dtype) -> None:
    """NaN in padded keys, in keys of blocks that no row attends, in queries of rows of blocks without any."""
    case = Case(dtype=dtype, padding=True, shared=True, density=1.0, partial=0.0, sizes=(48, 64))
    block_map = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    block_map[..., 1], block_map[..., 2, :] = False, False
    case.lists = BlockLists.from_block_map(block_map, (16, 16))
    clean = case.run(case.q, case.k, case.v)
    gradients = case.gradients(case.run, dtype)
    assert case.key_mask is not None
    for x in (case.k, case.v):
        x.masked_fill_(~case.key_mask[:, None, :, None], float("nan"))
        x[:, :, 16:32] = float("nan")
    case.q[:, :, 32:] = float("nan")
    for ours, own in zip(case.run(case.q, case.k, case.v), clean, strict=True):
        assert torch.equal(ours, own)
    for ours, own in zip(case.gradients(case.run, dtype), gradients, strict=True):
        assert torch.equal(ours, own)
    left_out = ~case.key_mask[:, None, :, None].expand_as(case.k)
    assert all(bool((x[left_out] == 0).all()) and bool((x[:, :, 16:32] == 0).all()) for x in gradients[1:])
    assert bool((gradients[0][:, :, 32:] == 0).all())


def test_a_nan_spreads_to_what_reads_it(backend: str) -> None:
    case = Case(density=1.0, partial=0.0)
    case.q[1, 0, 3, 5] = float("nan")
    out, lse = case.run(case.q, case.k, case.v)
    assert out[1, 0, 3].isnan().all() and out.isnan().sum() == case.dim and lse.isnan().sum() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [None, [70, 0, 133]])
def test_the_same_bits_every_time(
    backend: str, threads: Callable[[int], None], dtype: torch.dtype, lengths: list[int] | None
) -> None:
    case = Case(sizes=(150, 170), dtype=dtype, lengths=lengths, block=(32, 16))
    results = []
    for count in (1, 2, 5, 2):
        threads(count)
        results.append((*case.run(case.q, case.k, case.v), *case.gradients(case.run, dtype)))
    assert all(torch.equal(a, b) for result in results for a, b in zip(results[0], result, strict=True))


def test_a_head_or_sequence_does_not_see_the_others(backend: str) -> None:
    case = Case()
    together = case.run(case.q, case.k, case.v)
    for batch in range(2):
        for head in range(2):
            mask = case.mask[batch : batch + 1, head : head + 1]
            parts = (x[batch : batch + 1, head : head + 1] for x in (case.q, case.k, case.v))
            alone = block_sparse_attention(*parts, BlockLists.from_mask(mask, case.block))
            torch.testing.assert_close(alone[0, 0], together[0][batch, head])


def small(lengths: list[int] | None = None) -> tuple[Case, Tensors]:
    case = Case(sizes=(20, 33), dim=3, dtype=torch.float64, lengths=lengths, padding=lengths is None, heads=1)
    return case, tuple(x.contiguous().requires_grad_() for x in (case.q, case.k, case.v))


@pytest.mark.parametrize("lengths", [None, [7, 0, 19]])
def test_in_float64_it_is_the_formula_and_passes_gradcheck(lengths: list[int] | None) -> None:
    case, leaves = small(lengths)
    for ours, promised in zip(case.run(*leaves), case.plain(*leaves), strict=True):
        torch.testing.assert_close(ours, promised)

    def both(*x: Tensor) -> Tensors:
        out, lse = case.run(*x)
        return out, torch.where(lse.isinf(), 0.0, lse)

    assert torch.autograd.gradcheck(both, leaves)
    assert torch.autograd.gradcheck(lambda *x: both(*x)[1], leaves)


def test_only_the_gradients_asked_for(backend: str) -> None:
    case = Case()
    q = case.q.requires_grad_()
    block_sparse_attention(q, case.k, case.v, case.lists).sum().backward()
    assert q.grad is not None and case.k.grad is None and case.v.grad is None


def test_autocast_does_not_change_the_dtype_computed_in(backend: str) -> None:
    case = Case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = case.run(case.q, case.k, case.v)
    assert all(torch.equal(a, b) for a, b in zip(under, case.run(case.q, case.k, case.v), strict=True))


@pytest.mark.parametrize("lengths", [None, [20, 33]])
def test_compiled_gradients_equal_eager_ones(backend: str, lengths: list[int] | None) -> None:
    case = Case(lengths=lengths, padding=lengths is None)
    leaves = tuple(x.detach().clone().requires_grad_() for x in (case.q, case.k, case.v))

    def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = case.run(q, k, v)
        return out.square().sum() + torch.where(lse.isinf(), 0.0, lse).sum()

    results = []
    for run in (torch.compile(mixed, fullgraph=True, backend="aot_eager"), mixed):
        loss = run(*leaves)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for traced, eager in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [None, [20, 33]])
def test_opcheck(backend: str, lengths: list[int] | None) -> None:
    case, cpu = Case(lengths=lengths, padding=lengths is None), torch.device("cpu")
    lists = (case.lists.columns, case.lists.full_counts, case.lists.counts, case.lists.partial_bits)
    rest = (*lists, case.key_mask, case.cu_seqlens, case.lists.transposed(), [16, 16], 0.3)
    out, lse = case.run(case.q, case.k, case.v)
    leaves = tuple(x.requires_grad_() for x in (case.q, case.k, case.v))
    torch.library.opcheck(OPS["block_sparse_attention"].pick(cpu), (*leaves, *rest))
    fixed = tuple(x.detach() for x in leaves)
    torch.library.opcheck(OPS["block_sparse_attention_backward"].pick(cpu), (case.above, None, *fixed, out, lse, *rest))


def lists_for(queries: int, keys: int, *own: int) -> BlockLists:
    return BlockLists.from_mask(torch.ones(*(own or (1, 1)), queries, keys, dtype=torch.bool), (16, 16))


X = torch.zeros(2, 3, 20, 32)
FLAT = {name: torch.zeros(20, 3, 32) for name in "qkv"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 20, 32)}, r"q: expected float \[B, H, Sq, D\], got .*\[3, 20, 32\]"),
        ({"q": torch.zeros(2, 3, 20, 32, dtype=torch.int64)}, "q: expected float"),
        ({"k": torch.zeros(2, 4, 20, 32)}, r"k: expected torch.float32 \[2, 3, 20, 32\] to fit q"),
        ({"v": torch.zeros(2, 3, 21, 32)}, r"v: expected torch.float32 \[2, 3, 20, 32\] to fit q"),
        ({"v": X.double()}, "v: expected torch.float32"),
        ({"v": X.to("meta")}, "v: expected on cpu like q, got meta"),
        ({"blocks": torch.zeros(1)}, "blocks: expected BlockLists, got Tensor"),
        ({"blocks": lists_for(20, 20).to("meta")}, "blocks: expected on cpu like q, got meta"),
        ({"blocks": lists_for(19, 20)}, "blocks: expected lists for 20 queries and 20 keys, got lists for 19"),
        ({"blocks": lists_for(20, 20, 3, 1)}, "blocks: expected lists for 1 or 2 batches, got 3"),
        ({"blocks": lists_for(20, 20, 1, 2)}, "blocks: expected lists for 1 or 3 heads, got 2"),
        ({"key_mask": torch.ones(2, 20)}, r"key_mask: expected bool \[2, 20\], True where there is a token"),
        ({"key_mask": torch.ones(2, 21, dtype=torch.bool)}, r"key_mask: expected bool \[2, 20\]"),
        ({"cu_seqlens": torch.tensor([0, 20])}, r"q: expected float \[tokens, H, D\] with cu_seqlens"),
        ({**FLAT, "cu_seqlens": torch.tensor([0.0, 20])}, r"cu_seqlens: expected int32 or int64 \[B \+ 1\]"),
        ({**FLAT, "cu_seqlens": torch.tensor([0, 19])}, "cu_seqlens: expected to ascend from 0 to 20"),
        ({**FLAT, "cu_seqlens": torch.tensor([0, 19, 18, 20])}, "cu_seqlens: expected to ascend from 0 to 20"),
        (
            {**FLAT, "cu_seqlens": torch.tensor([0, 20]), "blocks": lists_for(16, 16)},
            "cu_seqlens: expected sequences of at most 16 tokens, as the lists have, got 20",
        ),
        ({**FLAT, "cu_seqlens": torch.tensor([0, 20]), "blocks": lists_for(20, 21)}, "as many queries as keys"),
        (
            {**FLAT, "cu_seqlens": torch.tensor([0, 20]), "key_mask": torch.ones(1, 20, dtype=torch.bool)},
            "key_mask: expected None with cu_seqlens",
        ),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    arguments = {"q": X, "k": X, "v": X, "blocks": lists_for(20, 20), **change}
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**arguments)
