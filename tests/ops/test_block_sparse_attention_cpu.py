"""The compiled body on the CPU, on every instruction set; what the op promises of all is in its own file."""

from __future__ import annotations

import ctypes
import ctypes.util
import itertools
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.block_attention import Case, check
from torch import Tensor

from sparsebert.ops import BlockLists, block_sparse_attention
from sparsebert.ops._backend import OPS

shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)
Within = Callable[..., None]
DTYPES = [torch.float32, torch.bfloat16]
BLOCKS = st.tuples(*[st.sampled_from([16, 32, 64, 128])] * 2)
REFUSALS = (RuntimeError, ValueError, IndexError)


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = OPS["block_sparse_attention"].missing("cpu")
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setenv("SPARSEBERT_BACKEND", "cpu")
    for name in ("block_sparse_attention", "block_sparse_attention_backward"):
        OPS[name]._overload("sparsebert")


def forward(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, *masks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The compiled body past the checks in Python."""
    return torch.ops.sparsebert.block_sparse_attention(*arguments(q, k, v, lists, *masks))


def arguments(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, key_mask: Tensor | None = None, starts: Tensor | None = None
) -> list[Any]:
    inner = [lists.columns, lists.full_counts, lists.counts, lists.partial_bits, key_mask, starts]
    return [q, k, v, *inner, [], list(lists.block), q.shape[-1] ** -0.5]


@shared
@given(
    block=BLOCKS,
    sizes=st.tuples(*[st.sampled_from([0, 1, 5, 16, 40, 77, 130])] * 2),
    dim=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(DTYPES),
    density=st.sampled_from([0.0, 0.5, 1.0]),
    partial=st.sampled_from([0.0, 0.7]),
    padding=st.booleans(),
    heads=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_within_torchs_own_error(isa: str, within: Within, **case: Any) -> None:
    if case["sizes"][1] == 0:
        case["padding"] = False
    check(Case(batches=2, **case), within)


@shared
@given(
    block=BLOCKS,
    lengths=st.lists(st.sampled_from([0, 1, 7, 16, 33, 70, 129]), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    alike=st.booleans(),
    seed=st.integers(0, 999),
)
def test_sequences_without_padding(
    isa: str, within: Within, block: tuple[int, int], lengths: list[int], dtype: torch.dtype, alike: bool, seed: int
) -> None:
    check(Case(block=block, lengths=lengths, dtype=dtype, shared=alike, seed=seed), within)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 2, 7, 17, 33, 80, 130])
def test_any_width(isa: str, within: Within, dim: int, dtype: torch.dtype) -> None:
    case = Case(sizes=(37, 50), dim=dim, dtype=dtype)
    out, _ = forward(case.q, case.k, case.v, case.lists)
    usual, exact = (case.plain(*(x.to(d) for x in (case.q, case.k, case.v)))[0] for d in (dtype, torch.float64))
    within(out, usual, exact, 2.0, tiny=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [1, 60])
def test_few_heads_and_many(within: Within, heads: int, dtype: torch.dtype) -> None:
    """Of few heads the keys are cut into ranges in the backward."""
    check(Case(block=(32, 16), batches=1, heads=heads, sizes=(90, 100), dtype=dtype, padding=True), within)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_keys_than_are_summed_at_a_time(within: Within, dtype: torch.dtype) -> None:
    check(Case(block=(128, 64), batches=1, heads=1, sizes=(130, 1500), dtype=dtype, density=0.9), within)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_whatever_the_threads(isa: str, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    case = Case(batches=2, heads=3, sizes=(130, 130), dim=64, dtype=dtype, padding=True)
    found = []
    for count in (1, 2, 3, 2):
        threads(count)
        found.append((*case.run(case.q, case.k, case.v), *case.gradients(case.run, dtype)))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_mask_leaves_out_is_not_read(isa: str, dtype: torch.dtype) -> None:
    case = Case(batches=3, sizes=(40, 90), dtype=dtype)
    case.key_mask = torch.arange(90) < torch.tensor([[90], [33], [0]])
    case.key_mask[0, 20:24] = False
    clean = (*case.run(case.q, case.k, case.v), *case.gradients(case.run, dtype))
    for x in (case.k, case.v):
        x.masked_fill_(~case.key_mask[:, None, :, None], torch.nan)
    dirty = (*case.run(case.q, case.k, case.v), *case.gradients(case.run, dtype))
    assert all(torch.equal(one, two) for one, two in zip(clean, dirty, strict=True))
    assert all(not bool(x.isnan().any()) for x in dirty)
    assert bool((dirty[0][2] == 0).all()) and bool((dirty[1][2] == -torch.inf).all())
    for gradient in dirty[3:]:
        assert bool((gradient.transpose(1, 2)[~case.key_mask] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_with_nothing_to_attend_to_is_not_seen(isa: str, dtype: torch.dtype) -> None:
    case = Case(sizes=(41, 50), dtype=dtype, density=0.9)
    mask = case.mask.clone()
    mask[:, :, 3::4] = False
    case.lists = BlockLists.from_mask(mask, case.block)
    clean = (*case.run(case.q, case.k, case.v), *case.gradients(case.run, dtype))
    for x in (case.q, case.above, case.above_lse[..., None]):
        x[:, :, 3::4] = torch.nan
    out, lse = case.run(case.q, case.k, case.v)
    assert torch.equal(out, clean[0]) and torch.equal(lse, clean[1])
    given = [case.above, case.above_lse.contiguous(), case.q, case.k, case.v, out, lse]
    rest = arguments(case.q, case.k, case.v, case.lists)[3:]
    gradients = torch.ops.sparsebert.block_sparse_attention_backward(*given, *rest)
    assert all(torch.equal(one, two) for one, two in zip(gradients, clean[2:], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_in_what_is_attended_shows(isa: str, dtype: torch.dtype) -> None:
    q, k, v = torch.ones(3, 1, 2, 64, 32, dtype=dtype).unbind(0)
    lists = BlockLists.from_block_map(torch.eye(2, dtype=torch.bool)[None, None], (32, 32))
    q, k, v = q.clone(), k.clone(), v.clone()
    q[0, 0, 3], v[0, 1, 40, 5] = torch.nan, torch.nan
    out, lse = forward(q, k, v, lists)
    assert bool(out[0, 0, 3].isnan().all()) and bool(lse[0, 0, 3].isnan())
    assert bool(out[0, 1, 32:, 5].isnan().all())
    assert int(out.isnan().sum()) == 32 + 32 and int(lse.isnan().sum()) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(isa: str, dtype: torch.dtype) -> None:
    case = Case(sizes=(40, 40), density=1.0, partial=0.0, dtype=dtype)
    out, _ = forward(case.q * 1e15, case.k * 1e15, case.v, case.lists)
    best = torch.einsum("bhqd,bhkd->bhqk", case.q.double(), case.k.double()).argmax(-1)
    torch.testing.assert_close(out, case.v.gather(2, best[..., None].expand_as(out)))


def test_a_pruned_head_gives_zeros_and_the_others_are_as_alone() -> None:
    case = Case(heads=3, sizes=(70, 70), shared=True, density=1.0)
    kept = torch.tensor([True, False, True])[None, :, None, None].expand(1, 3, 5, 5)
    out = block_sparse_attention(case.q, case.k, case.v, BlockLists.from_block_map(kept, (16, 16), lengths=(70, 70)))
    alone = BlockLists.from_block_map(torch.ones(1, 1, 5, 5, dtype=torch.bool), (16, 16), lengths=(70, 70))
    whole = block_sparse_attention(case.q, case.k, case.v, alone)
    assert isinstance(out, Tensor) and isinstance(whole, Tensor)
    assert bool((out[:, 1] == 0).all())
    assert torch.equal(out[:, ::2], whole[:, ::2])


@pytest.fixture
def wall() -> Iterator[Callable[[Tensor], Tensor]]:
    """Copies a tensor to where the byte after its last may not be touched, nor the page before its first."""
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    page, made = mmap.PAGESIZE, []

    def copy(tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        if not size:
            return tensor
        inner = -(-size // page) * page
        both = mmap.PROT_READ | mmap.PROT_WRITE
        base = libc.mmap(None, inner + 2 * page, both, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        made.append((base, inner + 2 * page))
        for at in (base, base + page + inner):
            assert libc.mprotect(at, page, 0) == 0
        memory = (ctypes.c_char * size).from_address(base + page + inner - size)
        return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)

    yield copy
    for base, length in made:
        libc.munmap(base, length)


def backward_arguments(given: list[Any]) -> list[Any]:
    out, lse = torch.ops.sparsebert.block_sparse_attention(*given)
    return [torch.ones_like(out), torch.ones_like(lse), *given[:3], out, lse, *given[3:]]


def on_walls(given: list[Any], wall: Callable[[Tensor], Tensor]) -> list[Any]:
    return [wall(part.contiguous()) if isinstance(part, Tensor) else part for part in given]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (5, 17), (40, 32), (70, 33)])
def test_nothing_beside_the_tensors_is_read(
    isa: str, wall: Callable[[Tensor], Tensor], rows: int, dim: int, dtype: torch.dtype
) -> None:
    case = Case(sizes=(rows, rows + 2), dim=dim, dtype=dtype, padding=True)
    given = arguments(case.q, case.k, case.v, case.lists, case.key_mask)
    for op, call in (("", given), ("_backward", backward_arguments(given))):
        body = getattr(torch.ops.sparsebert, f"block_sparse_attention{op}")
        for one, other in zip(body(*call), body(*on_walls(call, wall)), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("packed", [False, True])
def test_lists_at_random_are_refused_or_served(isa: str, wall: Callable[[Tensor], Tensor], packed: bool) -> None:
    case = Case(sizes=(70, 70), lengths=[33, 70, 0] if packed else None, density=0.6)
    given = on_walls(arguments(case.q, case.k, case.v, case.lists, None, case.cu_seqlens), wall)
    generator = torch.Generator().manual_seed(3)
    served = refused = 0
    for place, trial in itertools.product((3, 4, 5, 8) if packed else (3, 4, 5), range(12)):
        index = given[place].clone()
        limits = torch.iinfo(index.dtype)
        at = int(torch.randint(index.numel(), (), generator=generator))
        value = int(index.view(-1)[at])
        index.view(-1)[at] = [limits.min, limits.max, value + 1, value - 1, -1, 0][trial % 6]
        call = [*given[:place], wall(index), *given[place + 1 :]]
        try:
            out, lse = torch.ops.sparsebert.block_sparse_attention(*call)
        except REFUSALS:
            refused += 1
            continue
        assert not bool(out.isnan().any()) and not bool(lse.isnan().any())
        torch.ops.sparsebert.block_sparse_attention_backward(*backward_arguments(call))
        served += 1
    assert refused > 10 and served > 2


def cut(x: Tensor) -> Tensor:
    return x[..., :-1].contiguous()


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda x: x.half(), "q: expected float32 or bfloat16"),
        (0, lambda x: x[0], r"q: expected \[B, H, Sq, dim\]"),
        (1, lambda x: x.bfloat16(), "k: expected q's dtype"),
        (1, lambda x: x[:, :1], "k: expected size 2 at dimension 1, got 1"),
        (2, lambda x: x[:, :, :-1], "v: expected size 56 at dimension 2, got 55"),
        (2, lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), "v: expected stride 1 along dim"),
        (3, lambda x: x.long(), "columns: expected int32"),
        (3, lambda x: x[:, :, :-1].contiguous(), "columns: expected as many|full_counts: expected as many"),
        (3, lambda x: x + 100, "columns: expected between 0 and 3, got 10"),
        (3, lambda x: x - 100, "columns: expected between 0 and 3, got -"),
        (3, lambda x: torch.zeros_like(x), "columns: expected ascending"),
        (4, lambda x: x - 100, "full_counts: expected between 0 and counts"),
        (4, lambda x: x + 100, "full_counts: expected between 0 and counts"),
        (5, lambda x: x + 100, "counts: expected at most 4, got 10"),
        (6, lambda x: None, "counts: expected at most 0 partial blocks"),
        (6, cut, "partial_bits: expected uint8"),
        (7, lambda x: x.int(), "key_mask: expected 112 bools"),
        (7, cut, "key_mask: expected 112 bools"),
        (8, lambda x: torch.tensor([0, 40]), r"q: expected \[tokens, heads, dim\]"),
        (10, lambda x: [16], "block: expected two sizes"),
        (10, lambda x: [16, 0], "block: expected two sizes up to 1024"),
        (10, lambda x: [16, 2**62], "block: expected two sizes up to 1024"),
        (10, lambda x: [12, 16], "block: expected a multiple of 8 up to 1024, got 12"),
        (10, lambda x: [32, 16], "expected"),
    ],
)
def test_refused_by_name_below_python_too(place: int, change: Callable[[Any], Any], message: str) -> None:
    case = Case(padding=True)
    given = arguments(case.q, case.k, case.v, case.lists, case.key_mask)
    given[place] = change(given[place])
    with pytest.raises(REFUSALS, match=message):
        torch.ops.sparsebert.block_sparse_attention(*given)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([0, 50, 40, 103], "cu_seqlens: expected to ascend from 0 to 103"),
        ([0, 2**62, 103], "cu_seqlens: expected to ascend from 0 to 103"),
        ([], r"cu_seqlens: expected \[B \+ 1\]"),
        ([0, 103], "columns: expected 7 rows of blocks, got 5"),
    ],
)
def test_lengths_that_do_not_fit(starts: list[int], message: str) -> None:
    case = Case(lengths=[33, 70], shared=True)
    given = arguments(case.q, case.k, case.v, case.lists, None, torch.tensor(starts, dtype=torch.int64))
    with pytest.raises(REFUSALS, match=message):
        torch.ops.sparsebert.block_sparse_attention(*given)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda x: x[:, :, :-1], "grad_out: expected size 40 at dimension 2, got 39"),
        (1, lambda x: x[:, :-1], "grad_lse: expected a? ?contiguous|grad_lse: expected 160 float32"),
        (5, lambda x: x.double(), "out: expected q's dtype"),
        (6, lambda x: x.double(), "lse: expected 160 float32"),
        (7, lambda x: x + 100, "columns: expected between 0 and 3"),
    ],
)
def test_the_backward_refuses_too(place: int, change: Callable[[Any], Any], message: str) -> None:
    case = Case()
    given = backward_arguments(arguments(case.q, case.k, case.v, case.lists))
    given[place] = change(given[place])
    with pytest.raises(REFUSALS, match=message):
        torch.ops.sparsebert.block_sparse_attention_backward(*given)
