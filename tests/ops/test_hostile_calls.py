"""Calls past the checks in Python, `torch.ops.sparsebert.X(...)`, with arguments that no format makes.

Each is refused or gives a result that depends on its arguments alone, and nothing outside a tensor is read: the tensors
lie beside pages that may not be touched. `python tests/sanitize.py` watches the kernels' own buffers as well.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsebert.formats import Blocks, SemiStructured, Unstructured
from sparsebert.ops._backend import OPS
from sparsebert.ops.unstructured_linear import PANEL, STRIP

Wall = Callable[[Tensor], Tensor]
DTYPES = [torch.float32, torch.bfloat16]
HUGE = 2**40
REFUSALS = (RuntimeError, ValueError, IndexError)
N, K = STRIP + 9, PANEL + 21
INDICES = {
    "unstructured_linear": (2, 3, 4, 5),
    "unstructured_sddmm": (2, 3, 4, 5),
    "block_sparse_linear": (2, 3),
    "block_sparse_sddmm": (2, 3),
    "semi_structured_linear": (2,),
    "dense_linear": (),
    "varlen_attention": (3,),
    "add_layer_norm": (),
}
"""Every op that is called here, and which of its arguments are index tensors."""


@pytest.fixture(autouse=True)
def _kernels() -> None:
    for name in INDICES:
        reason = OPS[name].missing("cpu")
        if reason is not None:
            pytest.skip(f"{name}: {reason}")
        OPS[name]._overload("sparsebert")


@pytest.fixture
def wall() -> Iterator[Wall]:
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


def arguments(op: str, dtype: torch.dtype = torch.float32, rows: int = 5, seed: int = 0) -> list[Any]:
    """What a valid call of `op` takes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    if op == "varlen_attention":
        tokens = 3 * rows
        return [*(normal(tokens, 2, 17) for _ in range(3)), torch.tensor([0, rows, tokens]), 0.3]
    if op == "add_layer_norm":
        return [normal(rows, 37), normal(rows, 37), normal(37), normal(37), 1e-5]
    if op == "dense_linear":
        return [normal(rows, 37), normal(19, 37), normal(19), "gelu"]
    if op.startswith("unstructured"):
        stored = Unstructured.from_dense(normal(N, K), torch.rand(N, K, generator=generator) < 0.2)
        index = [stored.offsets, stored.rows, stored.counts, stored.starts]
        if op == "unstructured_sddmm":
            return [normal(rows, N), normal(rows, K), *index]
        return [normal(rows, K), stored.values, *index, normal(N), [N, K], "gelu", []]
    if op.startswith("block"):
        mask = (torch.rand(9, 33, generator=generator) < 0.3).repeat_interleave(8, 0).repeat_interleave(2, 1)
        whole = Blocks.from_dense(normal(72, 66), mask, block=(8, 2))
        if op == "block_sparse_sddmm":
            return [normal(rows, 72), normal(rows, 66), whole.columns, whole.row_starts, [8, 2]]
        return [normal(rows, 66), whole.values, whole.columns, whole.row_starts, normal(72), [72, 66], "gelu", []]
    mask = torch.tensor([True, False, True]).repeat(70, 55)
    groups = SemiStructured.from_dense(normal(70, 165), mask, pattern=(2, 3))
    return [normal(rows, 165), groups.values, groups.positions, normal(70), [2, 3], "gelu", []]


def call(op: str, given: list[Any], wall: Wall | None = None) -> Tensor:
    if wall is not None:
        given = [wall(part) if isinstance(part, Tensor) else part for part in given]
    result: Tensor = getattr(torch.ops.sparsebert, op)(*given)
    return result


def is_same(op: str, one: Tensor, other: Tensor) -> bool:
    """Bit for bit, but for torch's libraries: how they round depends on where the memory begins, and on strides."""
    return torch.allclose(one, other, rtol=0.01, atol=0.01) if op == "dense_linear" else torch.equal(one, other)


def is_steady(op: str, given: list[Any], wall: Wall) -> bool:
    """Whether the call is refused, or gives the same bits twice, whatever lay in memory between."""
    try:
        first = call(op, given, wall)
    except REFUSALS:
        return True
    filler = [torch.full((size,), float("nan")) for size in (2**10, 2**14, 2**17, 2**19)]
    del filler
    return torch.equal(first.view(torch.uint8), call(op, given, wall).view(torch.uint8))


@pytest.mark.parametrize("op", INDICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 18, 70])
def test_a_valid_call_reads_nothing_beside_its_tensors(
    isa: str, wall: Wall, op: str, dtype: torch.dtype, rows: int
) -> None:
    given = arguments(op, dtype, rows)
    one, other = call(op, given, wall), call(op, given)
    assert is_same(op, one, other)


@pytest.mark.parametrize("op", [op for op, places in INDICES.items() if places])
@pytest.mark.parametrize("rows", [1, 18, 70])
def test_indices_at_random(isa: str, wall: Wall, op: str, rows: int) -> None:
    given = arguments(op, torch.bfloat16, rows)
    generator = torch.Generator().manual_seed(rows)
    for place in INDICES[op]:
        index = given[place]
        for _ in range(8):
            raw = torch.randint(256, (index.numel() * index.element_size(),), generator=generator, dtype=torch.uint8)
            order = torch.randperm(index.numel(), generator=generator)
            one = index.clone()
            at = int(torch.randint(index.numel(), (), generator=generator))
            limits = torch.iinfo(index.dtype)
            one.view(-1)[at] = [limits.min, limits.max, int(index.view(-1)[at]) + (index.dtype != torch.uint8)][at % 3]
            for bad in (raw.view(index.dtype).view(index.shape), index.view(-1)[order].view(index.shape), one):
                assert is_steady(op, [*given[:place], bad, *given[place + 1 :]], wall)


def test_bytes_beyond_the_panel_and_the_strip(isa: str, wall: Wall) -> None:
    """No check sees them: their content is on trust. They name zeros and rows whose result is dropped."""
    for op in ("unstructured_linear", "unstructured_sddmm", "semi_structured_linear"):
        for rows in (1, 2, 18, 70):
            for place in INDICES[op][:2]:
                given = arguments(op, rows=rows)
                given[place] = torch.full_like(given[place], 255)
                result = call(op, given, wall)
                assert not result.isnan().any() and is_steady(op, given, wall)


@pytest.mark.parametrize(
    ("op", "place", "bad", "message"),
    [
        ("unstructured_linear", 5, torch.tensor([0, 9, 3, 4, 5]), "starts: expected to rise from 0"),
        ("unstructured_linear", 5, torch.tensor([-5, 0, 3, 4, 5]), "starts: expected to rise from 0"),
        ("unstructured_linear", 4, torch.zeros(2 * N, dtype=torch.uint8), "counts: a tile's do not add up"),
        ("unstructured_linear", 4, torch.full((2 * N,), 255, dtype=torch.uint8), "counts: a tile's do not add up"),
        ("unstructured_sddmm", 4, torch.full((2 * N,), 255, dtype=torch.uint8), "counts: a tile's do not add up"),
        (
            "unstructured_linear",
            7,
            [HUGE, HUGE],
            r"shape: expected \[N, K\] .* at most 2147483648, got",
        ),
        ("unstructured_linear", 7, [-1, K], r"shape: expected \[N, K\]"),
        ("unstructured_linear", 7, [N], r"shape: expected \[N, K\]"),
        ("unstructured_linear", 7, [2**63 - 1, 2**63 - 1], r"shape: expected \[N, K\]"),
        ("unstructured_linear", 6, torch.zeros(N - 1), "bias: expected"),
        ("unstructured_linear", 6, torch.zeros(N, dtype=torch.bfloat16), "bias: expected"),
        ("unstructured_linear", 8, "gelo", "activation: expected none, gelu"),
        ("block_sparse_linear", 2, "first = -1", "columns: expected to be below 33"),
        ("block_sparse_linear", 2, "first = 33", "columns: expected to be below 33"),
        ("block_sparse_linear", 2, "first = -2147483648", "columns: expected to be below 33"),
        ("block_sparse_sddmm", 2, "first = -1", "columns: expected to be below 33"),
        ("block_sparse_linear", 3, "first = 1", "row_starts: expected to rise from 0"),
        ("block_sparse_sddmm", 4, [0, 0], "is not made of blocks of 0 x 0"),
        ("block_sparse_sddmm", 4, [-8, 2], "is not made of blocks of -8 x 2"),
        ("block_sparse_linear", 5, [HUGE, HUGE], r"shape: expected \[N, K\]"),
        ("block_sparse_linear", 5, [-(2**63), -1], r"shape: expected \[N, K\]"),
        ("semi_structured_linear", 4, [0, 0], "pattern: expected n:m"),
        ("semi_structured_linear", 4, [2, 2**62], "pattern: expected n:m"),
        ("semi_structured_linear", 4, [1, 256], "positions: expected uint8"),
        ("varlen_attention", 3, torch.tensor([0, 9, 5, 15]), "cu_seqlens: expected to ascend from 0 to 15"),
        ("varlen_attention", 3, torch.tensor([0, 2**62]), "cu_seqlens: expected to ascend from 0 to 15"),
        ("varlen_attention", 3, torch.tensor([], dtype=torch.int64), r"cu_seqlens: expected \[B \+ 1\]"),
        ("dense_linear", 3, "", "activation: expected none, gelu"),
        ("dense_linear", 2, torch.zeros(18), "bias: expected"),
    ],
)
def test_what_is_refused_says_why(isa: str, op: str, place: int, bad: Any, message: str) -> None:
    for rows in (1, 40):
        given = arguments(op, rows=rows)
        if op == "varlen_attention":
            given = arguments(op)
        if isinstance(bad, str) and bad.startswith("first = "):
            given[place] = given[place].clone()
            given[place][0] = int(bad.removeprefix("first = "))
        else:
            given[place] = bad
        with pytest.raises(RuntimeError, match=message):
            call(op, given)


def altered(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor with another dtype, device, shape or layout than the call expects."""
    for dtype in (torch.float16, torch.float64, torch.int16, torch.bool, torch.complex64):
        yield tensor.to(dtype)
    yield tensor.to("meta")
    yield tensor.unsqueeze(0) if tensor.dim() < 2 else tensor.reshape(-1)
    yield tensor[:-1]
    yield torch.cat((tensor, tensor))
    yield tensor.new_empty(0)
    yield torch.zeros((), dtype=tensor.dtype)
    yield tensor.new_empty((0, *tensor.shape))
    yield tensor[:1].expand(HUGE, *tensor.shape[1:])
    yield tensor.to_sparse()


@pytest.mark.parametrize("op", INDICES)
def test_any_tensor_altered(isa: str, op: str) -> None:
    given = arguments(op)
    usual = call(op, given)
    for place, part in enumerate(given):
        if not isinstance(part, Tensor):
            continue
        for number, other in enumerate(altered(part)):
            try:
                result = call(op, [*given[:place], other, *given[place + 1 :]])
            except REFUSALS:
                continue
            # Another number of rows of x is no mistake.
            assert place == 0 and result.shape[-1] == usual.shape[-1], f"argument {place}, change {number}"


@pytest.mark.parametrize("op", INDICES)
def test_views_of_other_memory(isa: str, op: str) -> None:
    """Contiguous ones at an odd offset are taken as they are; for others it is the value that counts, or a refusal."""
    given = arguments(op, torch.bfloat16)
    usual = call(op, given)
    for place, part in enumerate(given):
        if not isinstance(part, Tensor):
            continue
        shifted = torch.cat((part.new_zeros(3), part.reshape(-1)))[3:].view(part.shape)
        spread = torch.stack((part, part), -1)[..., 0]
        assert is_same(op, call(op, [*given[:place], shifted, *given[place + 1 :]]), usual)
        try:
            result = call(op, [*given[:place], spread, *given[place + 1 :]])
        except RuntimeError as error:
            assert "contiguous" in str(error) or "stride 1" in str(error)
        else:
            assert is_same(op, result, usual)


def test_sizes_whose_products_overflow() -> None:
    none, byte = torch.empty(0), torch.empty(0, dtype=torch.uint8)
    start, start32 = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    wide, wider = torch.empty(0, HUGE), torch.empty(0, 2**60)
    wider_byte = torch.empty(0, 2**60, dtype=torch.uint8)
    for op, given in (
        ("unstructured_linear", [wide, none, byte, byte, byte, start, None, [HUGE, HUGE], "none", []]),
        ("unstructured_linear", [torch.empty(0, 1), none, byte, byte, byte, start, None, [2**63 - 1, 1], "none", []]),
        ("unstructured_sddmm", [wide, wide, byte, byte, byte, start]),
        (
            "semi_structured_linear",
            [wider, wider, wider_byte, None, [1, 256], "none", []],
        ),
        ("block_sparse_linear", [wider, torch.empty(0, 1, 1), start32[:0], start32, None, [0, 2**60], "none", []]),
        ("block_sparse_sddmm", [wider, wider, start32[:0], start32, [2**60, 2**60]]),
    ):
        with pytest.raises(RuntimeError, match=r"expected"):
            call(op, given)


def test_tensors_on_two_devices_are_refused(isa: str) -> None:
    """One on meta sends torch's dispatcher to the formula of shapes, whose result nobody fills."""
    for op in INDICES:
        given = arguments(op)
        for place, part in enumerate(given):
            if isinstance(part, Tensor):
                with pytest.raises(ValueError, match=f"{op}: expected tensors on one device, got cpu, meta"):
                    call(op, [*given[:place], part.to("meta"), *given[place + 1 :]])
