from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.test_linear_soft_cross_entropy import T, compare, few, leaves, make, plain, run

from sparsebert.ops._backend import OPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tokens, words, the student's width, the teacher's: one tile and several, ragged.
SIZES = ((1, 1, 1, 1), (5, 7, 3, 4), (37, 150, 40, 70), (130, 140, 24, 16))


@pytest.fixture
def cut(triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Slabs and chunks so small that there are several of each."""
    import sparsebert.kernels.linear_soft_cross_entropy as kernels

    monkeypatch.setattr(kernels, "_CHUNK", 16)
    monkeypatch.setattr(kernels, "_BUFFER", 2**12)
    return triton_backend


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_within_torchs_own_error(triton_backend: torch.device, size: Any, dtype: torch.dtype) -> None:
    compare(make(size, dtype, device=triton_backend))


@pytest.mark.parametrize("share", [None, 0.1, 0.6])
@pytest.mark.parametrize("bias", [True, False])
def test_slabs_and_chunks(cut: torch.device, share: float | None, bias: bool) -> None:
    for dtype in DTYPES[:2]:
        compare(make((37, 100, 17, 20), dtype, share, bias, device=cut))


@few
@given(
    size=st.tuples(*(st.integers(1, most) for most in (24, 60, 20, 20))),
    share=st.sampled_from([None, 0.2, 1.0]),
    bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_size(triton_backend: torch.device, size: Any, share: float | None, bias: bool, seed: int) -> None:
    compare(make(size, torch.float32, share, bias, seed, triton_backend))


def test_gradients_in_bfloat16_are_within_one_percent(triton_backend: torch.device) -> None:
    call = make((32, 500, 64, 96), torch.bfloat16, device=triton_backend)
    for result, truth in zip(run(call), plain(call), strict=True):
        assert (result.double() - truth).norm() <= 0.01 * truth.norm()


def test_student_and_teacher_of_two_dtypes(triton_backend: torch.device) -> None:
    call = make((20, 50, 16, 24), torch.bfloat16, device=triton_backend)
    for name in ("teacher_hidden", "teacher_weight", "teacher_bias"):
        call[name] = call[name].float()
    for result, truth in zip(run(call), plain(call), strict=True):
        assert (result.double() - truth).norm() <= 0.01 * truth.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_give_the_same_bits(cut: torch.device, dtype: torch.dtype) -> None:
    call = make((37, 100, 24, 16), dtype, device=cut)
    assert all(torch.equal(a, b) for a, b in zip(run(call), run(call), strict=True))


def test_what_does_not_count_and_what_is_not_written_is_never_seen(
    cut: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = make((37, 100, 24, 16), device=cut)
    call["labels"][20:] = -100  # whole chunks of nothing
    clean = run(call)
    with torch.no_grad():
        for name in ("student_hidden", "teacher_hidden"):
            call[name][call["labels"] == -100] = float("nan")
    from sparsebert.kernels.linear_soft_cross_entropy import _Call

    plain_new = _Call._new

    def poisoned(self: Any, *shape: Any) -> torch.Tensor:
        tensor = plain_new(self, *shape)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 1 << 20)

    monkeypatch.setattr(_Call, "_new", poisoned)
    for before, after in zip(clean, run(call), strict=True):
        assert torch.equal(before, after)
    assert not clean[1][call["labels"] == -100].any()


def test_with_nothing_that_counts_the_loss_is_0(triton_backend: torch.device) -> None:
    for call in (make((4, 9, 3, 5), share=0.0), make((0, 9, 3, 5), share=None)):
        call = {n: x if x is None else x.detach().to(triton_backend) for n, x in call.items()}
        for leaf in leaves(call):
            leaf.requires_grad_()
        loss, *gradients = run(call)
        assert loss.item() == 0.0 and not any(g.any() for g in gradients)


def test_a_word_at_minus_infinity_has_probability_0(triton_backend: torch.device) -> None:
    call = make((20, 150, 24, 16), device=triton_backend)
    call["teacher_bias"][:130] = -torch.inf  # whole tiles of nothing else
    torch.testing.assert_close(run(call)[0].double(), plain(call)[0], rtol=1e-5, atol=0)
    with torch.no_grad():
        call["student_weight"][3, 2] = float("nan")
    assert not run(call)[0].isfinite()


def test_an_infinite_weight_meets_only_the_tokens_that_count(triton_backend: torch.device) -> None:
    # One that gives a word no probability. The zeros in place of the other tokens' states make NaN with it.
    call = make((20, 30, 8, 8), torch.bfloat16, device=triton_backend)
    call["teacher_hidden"][:, 0] = -1.0
    call["teacher_weight"][3, 0] = torch.inf
    for result, truth in zip(run(call), plain(call), strict=True):
        assert (result.double() - truth).norm() <= 0.01 * truth.norm()


def test_opcheck(triton_backend: torch.device) -> None:
    call = make((5, 9, 3, 4), device=triton_backend)
    body = OPS["linear_soft_cross_entropy"].pick(triton_backend)
    assert body.namespace == "sparsebert_triton"
    keep = call.pop("labels") != -100
    torch.library.opcheck(body, (*call.values(), keep, T, True, True, True))


def test_memory_and_cost_at_the_size_that_is_promised() -> None:
    from sparsebert.kernels.linear_soft_cross_entropy import cost, plan, tiles, workspace

    assert workspace(16384, 30522, 768, 2) <= 128 * 2**20
    tile = tiles(16384, 30522, 768, 2)
    cut = plan(16384, 30522, tile, 2, 132)
    # 128 tiles of tokens, so three parts for two waves; 477 tiles of 64 words, 159 each. Slabs of 4,096 words.
    assert (cut.parts, cut.per_part, cut.slab, cut.chunk) == (3, 159 * 64, 4096, 4096)
    forward, whole = (cost(16384, 30522, 768, 768, need_grad=need) for need in (False, True))
    product = 2 * 16384 * 768
    assert forward.flops - 2 * product * 477 * 64 == 12 * 16384 * 3 + 128  # the products; parts; partial sums
    assert forward.launches == 3 and whole.launches == 3 + 3 * 8 * 4 + 1
    # Logits of both again over 239 tiles of 128 words, then the two products of the gradient; the bias's columns.
    more = whole.flops - forward.flops
    assert more == product * (2 * 239 * 128 + 30522 + 239 * 128) + 128 * 30522
    stats = 20 * 3 * 16384
    assert forward.written == stats + 8 * 16384 + 4 * 128 + 4
    assert forward.read == 30522 * (2 * 768 * 2 + 4) + 3 * 16384 * 2 * 768 * 2 + stats + 4 * 128
