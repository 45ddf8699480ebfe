from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsebert.formats import SemiStructured
from sparsebert.ops import packed_residue, semi_structured_pack, semi_structured_packed_linear
from sparsebert.ops._backend import OPS
from sparsebert.ops._linear import ACTIVATIONS, linear_reference
from sparsebert.ops.semi_structured_pack import unpacked
from sparsebert.ops.semi_structured_residue import unpacked_residue


def stored_of(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> SemiStructured:
    kept = torch.rand(n, k // 4, 4).argsort(2).view(n, k) < 2
    return SemiStructured.from_dense(torch.randn(n, k).to(dtype), kept)


def packed_of(stored: SemiStructured) -> Tensor:
    return semi_structured_pack(stored.values, stored.positions)


def test_a_tile_byte_by_byte() -> None:
    # A row of 64 columns keeps the first and the last of every four, row 9 the second and third; values are counted.
    values = torch.arange(128 * 32, dtype=torch.float32).view(128, 32).bfloat16()
    positions = torch.full((128, 8), 0b1100_1100, dtype=torch.uint8)
    positions[9] = 0b1001_1001
    (tile,) = semi_structured_pack(values, positions)[0]
    weights = tile[:8192].view(torch.bfloat16)
    # The second half of the first product's columns begins after 64 rows of 8; the second product after both halves.
    assert torch.equal(weights[:8], values[0, :8]) and torch.equal(weights[8:16], values[1, :8])
    assert torch.equal(weights[512:520], values[0, 8:16]) and torch.equal(weights[1024:1032], values[0, 16:24])
    assert torch.equal(weights[2048:2056], values[64, :8])
    words = tile[8192:].view(torch.int32).view(2, 128)
    usual, other = 0xCCCC, 0x9999
    # Threads 4 to 7 hold rows 1 and 9 in one word.
    assert [int(word) & 0xFFFFFFFF for word in words[0, :8]] == [usual << 16 | usual] * 4 + [other << 16 | usual] * 4


@given(
    n=st.sampled_from([1, 8, 128, 130, 260]),
    k=st.sampled_from([4, 12, 64, 68, 200]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_unpacked_it_is_the_weight_again(n: int, k: int, dtype: torch.dtype) -> None:
    stored = stored_of(n, k, dtype)
    packed = packed_of(stored)
    assert packed.shape == (-(-n // 128), -(-k // 64), 9216) and packed.is_contiguous()
    assert torch.equal(unpacked(packed, (n, k), dtype), stored.to_dense())


@given(
    n=st.sampled_from([1, 64, 130, 200]),
    k=st.sampled_from([4, 64, 100, 700]),
    density=st.sampled_from([0.0, 0.001, 0.05, 1.0]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_a_residue_is_all_there(n: int, k: int, density: float, dtype: torch.dtype) -> None:
    matrix = torch.where(torch.rand(n, k) < density, torch.randn(n, k), 0.0).to(dtype)
    spans, columns, values = parts = packed_residue(matrix)
    assert torch.equal(unpacked_residue(parts, (n, k)), matrix)
    groups, steps = 2 * -(-n // 128), -(-k // 64)
    assert spans.shape == (groups, steps) and columns.shape[::2] == (groups, 64) and values.shape[3:] == (128, 8)
    # A chunk ends with the last step of each, and none has more slots than there are.
    words = spans.long()
    assert (words[:, -1] >> 15 & 1).all() and ((words & 255) + (words >> 8 & 127) <= 16 * values.shape[2]).all()
    assert (words >> 16).max() + 1 == columns.shape[1] == (words[0] >> 15 & 1).sum()


def test_a_slot_place_by_place() -> None:
    # Row 73 is row 9 of the second group; columns 70 and 3 are slots 1 and 0, of the second and the first step.
    matrix = torch.zeros(128, 128).bfloat16()
    matrix[73, 3], matrix[73, 70], matrix[64, 70] = 5.0, 7.0, 9.0
    spans, columns, values = packed_residue(matrix)
    assert spans.tolist() == [[0, 1 << 15], [0 | 1 << 8, 1 | 1 << 8 | 1 << 15]]
    assert columns[1, 0, :2].tolist() == [3, 6]
    # Thread 4 holds of row 1 and of row 9 slots 0 and 1; thread 0 of row 0.
    assert values[1, 0, 0, 4].tolist() == [0, 0, 5, 7, 0, 0, 0, 0] and values[1, 0, 0, 0].tolist() == [0, 9] + [0] * 6


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_the_dense_layer(activation: str, dtype: torch.dtype) -> None:
    stored, x, bias = stored_of(136, 72, dtype), torch.randn(2, 3, 72).to(dtype), torch.randn(136).to(dtype)
    y = semi_structured_packed_linear(x, packed_of(stored), bias, shape=(136, 72), activation=activation)
    assert torch.equal(y, linear_reference(x, stored.to_dense(), bias, activation)) and y.shape == (2, 3, 136)
    assert semi_structured_packed_linear(x[:0], packed_of(stored), shape=(136, 72)).shape == (0, 3, 136)


def test_opcheck_and_compile() -> None:
    stored, x = stored_of(16, 24), torch.randn(3, 24).bfloat16()
    cpu = torch.device("cpu")
    torch.library.opcheck(OPS["semi_structured_pack"].pick(cpu), (stored.values, stored.positions))
    arguments = (x, packed_of(stored), None, packed_residue(torch.eye(16, 24).bfloat16()), [16, 24], "gelu")
    torch.library.opcheck(OPS["semi_structured_packed_linear"].pick(cpu), arguments)

    def both(values: Tensor, x: Tensor) -> Tensor:
        packed = semi_structured_pack(values, stored.positions)
        return semi_structured_packed_linear(x, packed, shape=(16, 24), activation="gelu")

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    assert torch.equal(compiled(stored.values, x), both(stored.values, x))


def test_what_does_not_fit_is_named() -> None:
    stored, x, bias = stored_of(16, 24), torch.randn(3, 24).bfloat16(), torch.randn(16).bfloat16()
    packed, residue = packed_of(stored), packed_residue(torch.eye(16, 24).bfloat16())

    def call(x: Tensor = x, packed: Tensor = packed, bias: Tensor | None = bias, **options: Any) -> Tensor:
        return semi_structured_packed_linear(x, packed, bias, **{"shape": (16, 24), **options})

    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: semi_structured_pack(stored.values.float(), stored.positions), "values: expected bfloat16 or float16"),
        (lambda: semi_structured_pack(stored.values[:, 1:], stored.positions), "values: expected bfloat16 or float16"),
        (lambda: semi_structured_pack(stored.values, stored.positions[:, 1:]), r"positions: expected torch.uint8 \[16"),
        (lambda: call(x=x.float()), "x: expected bfloat16 or float16"),
        (lambda: call(x=x[:, 1:]), r"x: expected \[..., 24\]"),
        (lambda: call(bias=bias.half()), "bias: expected torch.bfloat16 like x"),
        (lambda: call(bias=bias[1:]), r"bias: expected \[16\], got \[15\]"),
        (lambda: call(packed=packed[..., 1:]), r"packed: expected torch.uint8 \[1, 1, 9216\]"),
        (lambda: call(activation="swish"), "activation"),
        (lambda: call(x=x.clone().requires_grad_()), "use semi_structured_linear"),
        (lambda: call(residue=residue[:2]), "residue: expected the three tensors of packed_residue, got 2"),
        (lambda: call(residue=[residue[0][1:], *residue[1:]]), r"residue's spans: expected torch.int32 \[2, 1\]"),
        (lambda: call(residue=[residue[0], residue[1].int(), residue[2]]), "residue's columns: expected torch.uint8"),
        (lambda: call(residue=[*residue[:2], residue[2].half()]), "residue's values: expected torch.bfloat16"),
        (lambda: packed_residue(torch.ones(4, 4)), "residue: expected bfloat16 or float16"),
    ]
    for run, message in cases:
        with pytest.raises(ValueError, match=message):
            run()
