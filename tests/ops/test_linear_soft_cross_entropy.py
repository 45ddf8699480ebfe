from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparsebert.ops import linear_soft_cross_entropy
from sparsebert.ops._backend import OPS

T = 1.7
NAMES = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight", "student_bias", "teacher_bias")
few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
Call = dict[str, Any]


@pytest.fixture(params=["", "reference"])
def any_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call gets by itself, and everything plain."""
    monkeypatch.setenv("SPARSEBERT_BACKEND", request.param)


def make(
    size: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    share: float | None = 0.5,
    bias: bool = True,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Call:
    """A call's tensors for `(tokens, words, student's width, teacher's width)`; the student's are leaves."""
    tokens, words, mine, theirs = size
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, mine), (words, mine), (tokens, theirs), (words, theirs), (words,), (words,)]
    scales = [1.0, 2 / max(mine, 1) ** 0.5, 1.0, 2 / max(theirs, 1) ** 0.5, 1.0, 1.0]
    call: Call = {}
    for name, shape, scale in zip(NAMES, shapes, scales, strict=True):
        made = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)
        call[name] = made.requires_grad_(name.startswith("student"))
    if not bias:
        call["student_bias"] = call["teacher_bias"] = None
    if share is not None:
        labels = torch.randint(max(words, 1), (tokens,), generator=generator)
        labels[torch.rand(tokens, generator=generator) >= share] = -100
        if tokens and share > 0:
            labels[-1] = 0
        call["labels"] = labels.to(device)
    return call


def leaves(call: Call) -> list[Tensor]:
    return [x for name, x in call.items() if name.startswith("student") and x is not None]


def plain(call: Call, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Loss and gradients by torch, at a dtype; logits are as autocast makes them."""
    other = {name: x if name == "labels" or x is None else x.detach().to(dtype) for name, x in call.items()}
    for leaf in leaves(other):
        leaf.requires_grad_()
    logits = [
        F.linear(other[f"{side}_hidden"], other[f"{side}_weight"], other[f"{side}_bias"]) / T
        for side in ("student", "teacher")
    ]
    rows = -(F.softmax(logits[1], -1) * F.log_softmax(logits[0], -1)).sum(-1)
    loss = (rows if "labels" not in other else rows[other["labels"] != -100]).mean() * T**2
    return (loss.detach(), *torch.autograd.grad(loss, leaves(other)))


def run(call: Call, function: Callable[..., Tensor] = linear_soft_cross_entropy) -> tuple[Tensor, ...]:
    loss = function(**call, temperature=T)
    return (loss.detach(), *torch.autograd.grad(loss, leaves(call)))


def compare(call: Call) -> None:
    """The design's budget: twice torch's own error for the loss, three times for gradients."""
    dtype = call["student_hidden"].dtype
    for i, (result, own, truth) in enumerate(zip(run(call), plain(call, dtype), plain(call), strict=True)):
        slack = max(1e-6, torch.finfo(dtype).eps if i else 0) * truth.abs().max()
        assert (result.double() - truth).abs().max() <= (3 if i else 2) * (own.double() - truth).abs().max() + slack
        assert result.dtype == (dtype if i else torch.float32)


@few
@given(
    size=st.tuples(*(st.integers(1, most) for most in (20, 70, 40, 40))),
    share=st.sampled_from([None, 0.2, 1.0]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 999),
)
def test_within_torchs_own_error(
    any_backend: None, size: Any, share: float | None, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    compare(make(size, dtype, share, bias, seed))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module = sys.modules["sparsebert.ops.linear_soft_cross_entropy"]
    call = make((50, 30, 8, 12), torch.float64)
    whole = run(call)
    monkeypatch.setattr(module, "_LOGITS", 7 * 30)
    for one, other in zip(whole, run(call), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_in_float64_it_is_the_formula_and_passes_gradcheck() -> None:
    call = make((5, 7, 3, 4), torch.float64)
    for one, truth in zip(run(call), plain(call), strict=True):
        torch.testing.assert_close(one, truth, rtol=1e-11, atol=1e-12)
    others = {name: x for name, x in call.items() if not name.startswith("student")}

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mine = {"student_hidden": hidden, "student_weight": weight, "student_bias": bias}
        return linear_soft_cross_entropy(**mine, **others, temperature=T)

    assert torch.autograd.gradcheck(loss, leaves(call))


def test_gradients_in_bfloat16_are_within_one_percent(any_backend: None) -> None:
    call = make((64, 3000, 64, 96), torch.bfloat16)
    for result, truth in zip(run(call), plain(call), strict=True):
        assert (result.double() - truth).norm() <= 0.01 * truth.norm()


def test_with_nothing_that_counts_the_loss_is_0(any_backend: None) -> None:
    for call in (make((4, 9, 3, 5), share=0.0), make((0, 9, 3, 5), share=None)):
        loss, *gradients = run(call)
        assert loss.item() == 0.0 and not any(g.any() for g in gradients)
        assert [g.shape for g in gradients] == [x.shape for x in leaves(call)]


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_what_does_not_count_is_never_seen(any_backend: None, what: float) -> None:
    call = make((20, 30, 8, 12))
    clean = run(call)
    with torch.no_grad():
        for name in ("student_hidden", "teacher_hidden"):
            call[name][call["labels"] == -100] = what
    assert all(torch.equal(a, b) for a, b in zip(clean, run(call), strict=True))
    assert not clean[1][call["labels"] == -100].any()


def test_another_index_to_ignore_and_no_labels_at_all() -> None:
    call = make((12, 9, 4, 4))
    loss = run(call)[0]
    call["labels"] = call["labels"].masked_fill(call["labels"] == -100, 77)
    assert torch.equal(linear_soft_cross_entropy(**call, temperature=T, ignore_index=77), loss)
    every = {name: x for name, x in call.items() if name != "labels"}
    torch.testing.assert_close(run(every), run({**every, "labels": torch.zeros(12, dtype=torch.int32)}))


def test_only_what_needs_a_gradient_gets_one(any_backend: None) -> None:
    full = dict(zip((n for n in NAMES if n.startswith("student")), run(make((9, 20, 6, 4)))[1:], strict=True))
    for wanted in full:
        call = make((9, 20, 6, 4))
        for name in full:
            call[name].requires_grad_(name == wanted)
        (found,) = torch.autograd.grad(linear_soft_cross_entropy(**call, temperature=T), call[wanted])
        torch.testing.assert_close(found, full[wanted])
    with torch.no_grad():
        assert not linear_soft_cross_entropy(**make((9, 20, 6, 4))).requires_grad


def test_the_teacher_is_a_constant_and_the_weights_dtype_follows_the_states() -> None:
    call = make((9, 20, 6, 4), torch.bfloat16)
    for name in NAMES[2:4]:
        call[name].requires_grad_()
    call["student_weight"] = call["student_weight"].detach().float().requires_grad_()
    (0.5 * linear_soft_cross_entropy(**call)).backward()
    assert call["teacher_hidden"].grad is None and call["teacher_weight"].grad is None
    assert call["student_weight"].grad.dtype == torch.float32 and call["student_hidden"].grad.dtype == torch.bfloat16


def test_autocast_and_strides_change_nothing(any_backend: None) -> None:
    call = make((9, 20, 6, 4))
    usual = run(call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(usual, run(call), strict=True))
    call["student_weight"] = call["student_weight"].detach().t().contiguous().t().requires_grad_()
    torch.testing.assert_close(run(call), usual)


def test_compiled_gradients_equal_eager_ones(any_backend: None) -> None:
    torch._dynamo.reset()
    for dtype in (torch.float32, torch.float16):
        call = make((9, 20, 6, 4), dtype)
        compiled = torch.compile(linear_soft_cross_entropy, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(run(call, compiled), run(call), rtol=1e-6, atol=1e-7)


def test_opcheck(any_backend: None) -> None:
    call = make((9, 20, 6, 4))
    body = OPS["linear_soft_cross_entropy"].pick(torch.device("cpu"))
    keep = call.pop("labels") != -100
    torch.library.opcheck(body, (*call.values(), keep, T, True, True, True))
    fixed = [x.detach() for x in call.values()]
    torch.library.opcheck(body, (*fixed[:4], None, None, None, T, False, False, False))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"student_hidden": torch.zeros(2, 3, 4)},
            ValueError,
            r"student_hidden: expected \[T, width\], got \[2, 3, 4\]",
        ),
        ({"teacher_hidden": torch.zeros(5, 6)}, ValueError, r"teacher_hidden: expected \[9, width\], got \[5, 6\]"),
        ({"student_weight": torch.zeros(20, 5)}, ValueError, r"student_weight: expected \[V, 6\], got \[20, 5\]"),
        ({"teacher_weight": torch.zeros(19, 4)}, ValueError, r"teacher_weight: expected \[20, 4\], got \[19, 4\]"),
        ({"teacher_bias": torch.zeros(4)}, ValueError, r"teacher_bias: expected \[20\], got \[4\]"),
        ({"student_bias": torch.zeros(20).long()}, TypeError, "student_bias: expected a float tensor, got torch.int64"),
        ({"teacher_bias": torch.zeros(20, device="meta")}, ValueError, "teacher_bias: expected on cpu"),
        ({"labels": torch.zeros(9)}, TypeError, "labels: expected integers, got torch.float32"),
        ({"labels": torch.zeros(8).long()}, ValueError, r"labels: expected \[9\], one for each token, got \[8\]"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive number, got 0.0"),
    ],
)
def test_what_does_not_fit_is_named(change: Call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_soft_cross_entropy(**{**make((9, 20, 6, 4)), **change})
