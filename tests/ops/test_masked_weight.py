from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsebert.ops import masked_weight, pack_bits
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
