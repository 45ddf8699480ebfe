from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsebert.ops import masked_weight, masked_weights, pack_bits
from sparsebert.ops._backend import OPS

shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@shared
@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 40)),
    block=st.one_of(st.just((1, 1)), st.tuples(st.integers(1, 40), st.integers(1, 40))),
    density=st.sampled_from([0.0, 0.5, 1.0]),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    seed=st.integers(0, 999),
)
def test_what_is_kept_is_copied_and_what_is_pruned_is_zero(
    isa: str,
    grid: tuple[int, int],
    block: tuple[int, int],
    density: float,
    dtypes: tuple[torch.dtype, torch.dtype],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(grid[0] * block[0], grid[1] * block[1]) * 10 ** torch.randint(-6, 6, (1,))
    weight[torch.rand(weight.shape) < 0.05] = float("nan")
    weight[torch.rand(weight.shape) < 0.05] = float("inf")
    weight = weight.to(dtypes[0])
    mask = torch.rand(grid) < density
    result = masked_weight(weight, pack_bits(mask), grid, dtype=dtypes[1])
    kept = mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    assert result.dtype == dtypes[1]
    assert torch.equal(result[~kept], torch.zeros((), dtype=dtypes[1]).expand(int((~kept).sum())))
    torch.testing.assert_close(result[kept], weight[kept].to(dtypes[1]), rtol=0, atol=0, equal_nan=True)


def test_every_bfloat16_and_float16_comes_through_unchanged(isa: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
        bits = pack_bits(torch.ones(256, 256, dtype=torch.bool))
        assert torch.equal(masked_weight(every, bits).view(torch.int16), every.view(torch.int16))
        wide = masked_weight(every, bits, dtype=torch.float32)
        torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)
        back = masked_weight(wide, bits, dtype=dtype)
        torch.testing.assert_close(back, every, rtol=0, atol=0, equal_nan=True)


def test_out_is_written_and_returned(backend: str) -> None:
    weight, out = torch.randn(4, 6), torch.full((4, 6), float("nan"), dtype=torch.bfloat16)
    bits = pack_bits(torch.tensor([[True, False], [False, True]]))
    before = out._version
    assert masked_weight(weight, bits, (2, 2), out=out) is out
    assert torch.equal(out, torch.block_diag(weight[:2, :3], weight[2:, 3:]).bfloat16())
    assert out._version > before


def test_a_strided_weight_and_float64(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSEBERT_BACKEND")  # both go to the reference
    mask = torch.rand(6, 4) < 0.5
    for weight in (torch.randn(4, 6).t(), torch.randn(6, 4, dtype=torch.float64)):
        zero = torch.zeros((), dtype=weight.dtype)
        assert torch.equal(masked_weight(weight, pack_bits(mask)), torch.where(mask, weight, zero))


def test_it_carries_no_gradient(backend: str) -> None:
    weight = torch.randn(2, 4, requires_grad=True)
    assert not masked_weight(weight, pack_bits(torch.ones(2, 4, dtype=torch.bool))).requires_grad


def test_an_empty_weight(backend: str) -> None:
    assert masked_weight(torch.empty(0, 8), torch.empty(0, dtype=torch.uint8)).shape == (0, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (3, 8)}, "does not divide"),
        ({"bits": torch.zeros(3, dtype=torch.uint8)}, r"bits: expected uint8 \[4\] for 32 entries"),
        ({"out": torch.zeros(4, 7)}, r"out: expected float \[4, 8\]"),
        ({"out": torch.zeros(4, 8), "dtype": torch.bfloat16}, r"dtype: torch\.bfloat16 does not fit out"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], message: str) -> None:
    arguments = {"weight": torch.zeros(4, 8), "bits": torch.zeros(4, dtype=torch.uint8), **change}
    with pytest.raises(ValueError, match=message):
        masked_weight(**arguments)


def test_opcheck(backend: str) -> None:
    op = OPS["masked_weight"].pick(torch.device("cpu"))
    bits = pack_bits(torch.rand(2, 4) < 0.5)
    torch.library.opcheck(op, (torch.randn(4, 8), bits, [2, 4], torch.empty(4, 8, dtype=torch.bfloat16)))


def test_many_are_one_after_the_other(backend: str) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(3, 5), torch.randn(0, 4), torch.randn(7, 300), torch.randn(1, 1)]
    weights[2][0, :9] = float("nan")
    masks = [torch.rand(weight.shape) < 0.5 for weight in weights]
    out = [
        torch.full(weight.shape, float("nan"), dtype=dtype) for weight, dtype in zip(weights, DTYPES * 2, strict=False)
    ]
    before = [result._version for result in out]
    masked_weights(weights, [pack_bits(mask) for mask in masks], out)
    for weight, mask, result, version in zip(weights, masks, out, before, strict=True):
        expected = torch.where(mask, weight, 0.0).to(result.dtype)
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
        assert result._version > version
    masked_weights([], [], [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_results_too_large_for_the_caches(isa: str, dtype: torch.dtype, offset: int) -> None:
    torch.manual_seed(0)
    rows, columns = (2 << 20) // 3 * (4 // dtype.itemsize), 13
    weight = torch.randn(rows, columns, dtype=torch.bfloat16).to(torch.float32)
    mask = torch.rand(rows, columns) < 0.5
    # Guards before and after: nothing but the result may be written, wherever it begins.
    memory = torch.full((offset + rows * columns + 7,), 3.0, dtype=dtype)
    out = memory[offset : offset + rows * columns].view(rows, columns)
    assert out.nbytes > 32 << 20
    masked_weights([weight], [pack_bits(mask)], [out])
    assert torch.equal(out, torch.where(mask, weight, 0.0).to(dtype))
    blocks = (rows, 1)
    kept = torch.rand(blocks) < 0.5
    masked_weight(weight, pack_bits(kept), blocks, out=out)
    assert torch.equal(out, torch.where(kept, weight, 0.0).to(dtype))
    assert bool((memory[:offset] == 3).all()) and bool((memory[-7:] == 3).all())


def test_many_that_do_not_fit_are_named() -> None:
    weight, bits = torch.zeros(4, 8), torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="bits, out: expected 1, one for each weight, got 0 and 1"):
        masked_weights([weight], [], [weight])
    with pytest.raises(ValueError, match=r"bits: expected uint8 \[4\] for 32 entries"):
        masked_weights([weight, weight], [bits, bits[:3]], [weight, weight])
    with pytest.raises(ValueError, match=r"weights\[1\]: expected \[N, K\]"):
        masked_weights([weight, weight[0]], [bits, bits], [weight, weight])


def test_opcheck_of_many(backend: str) -> None:
    op = OPS["masked_weights"].pick(torch.device("cpu"))
    bits = [pack_bits(torch.rand(4, 8) < 0.5), pack_bits(torch.rand(2, 3) < 0.5)]
    torch.library.opcheck(op, ([torch.randn(4, 8), torch.randn(2, 3)], bits, [torch.empty(4, 8), torch.empty(2, 3)]))
