"""Distillation losses, forward and backward: one op each against the usual torch code.

Random normal numbers, warm caches (the same tensors every time), the gradient with respect to every student tensor, a
loss of weight 1; a row with `masked` leaves out a quarter of the tokens on average. "eager" is what the methods' codes
do, in the dtype of the tensors, but for the logits, which they take to float32. No speed is reported on a wrong result:
each loss is compared with its reference first. `torch.compile` is left out: what it makes of these depends on the C++
compiler at hand, and takes it minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsebert.ops import attention_kl, attention_mse, hidden_cosine, hidden_mse, relation_kl, soft_cross_entropy

DTYPES = (torch.float32, torch.bfloat16)
LAYERS, BATCH, SEQ, WIDTH, HEADS = 13, 8, 128, 768, 12


def gradients(loss: Tensor, student: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, student))


def tokens_of(seq: int) -> Tensor:
    """Sequences of half to all of `seq` tokens."""
    return torch.arange(seq)[None] < torch.randint(seq // 2, seq + 1, (BATCH, 1))


def race(
    bench: Any,
    table: str,
    case: dict[str, Any],
    student: list[Tensor],
    fused: Callable[[list[Tensor]], Tensor],
    eager: Callable[[list[Tensor]], Tensor],
    exact: Callable[[list[Tensor]], Tensor],
) -> None:
    """Check `fused` against `exact` (which gets the student in float64), then time it against `eager`."""
    wide = [s.detach().double().requires_grad_() for s in student]
    loss, truth = fused(student), exact(wide)
    assert abs(loss.item() - truth.item()) <= 1e-4 * abs(truth.item())
    for gradient, true in zip(gradients(loss, student), gradients(truth, wide), strict=True):
        # 1 %: a bf16 gradient is rounded by up to 0.4 %.
        assert (gradient.double() - true).norm() <= 0.01 * true.norm()
    del wide, loss, truth
    timings = bench.interleave(
        {"fused": lambda: gradients(fused(student), student), "eager": lambda: gradients(eager(student), student)}
    )
    bench.row(table, case, timings, "fused")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "classes"), [(512, 30522), (4096, 3)])
def test_soft_cross_entropy(bench: Any, rows: int, classes: int, dtype: torch.dtype) -> None:
    student, teacher = (torch.randn(2, rows, classes) * 3).to(dtype).unbind()
    temperature = 2.0

    def eager(leaves: list[Tensor]) -> Tensor:
        log_student = F.log_softmax(leaves[0].float() / temperature, -1)
        return F.kl_div(log_student, F.softmax(teacher.float() / temperature, -1), reduction="batchmean") * 4

    race(
        bench,
        "soft_cross_entropy",
        {"rows": rows, "classes": classes, "dtype": str(dtype)[6:], "eager": "kl_div"},
        [student.clone().requires_grad_()],
        lambda leaves: soft_cross_entropy(leaves[0], teacher, temperature=temperature),
        eager,
        lambda leaves: soft_cross_entropy(leaves[0], teacher.double(), temperature=temperature),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_hidden(bench: Any, kind: str, masked: bool, dtype: torch.dtype) -> None:
    student = [torch.randn(BATCH, SEQ, WIDTH).to(dtype).requires_grad_() for _ in range(LAYERS)]
    teacher = [torch.randn(BATCH, SEQ, WIDTH).to(dtype) for _ in range(LAYERS)]
    mask = tokens_of(SEQ) if masked else None
    op = hidden_mse if kind == "mse" else hidden_cosine

    def of_layer(s: Tensor, t: Tensor) -> Tensor:
        if kind == "mse":
            if mask is None:
                return F.mse_loss(s, t)
            keep = mask.unsqueeze(-1).to(s.dtype)
            return ((s - t).square() * keep).sum() / (mask.sum() * WIDTH)
        rows = 1 - F.cosine_similarity(s, t, dim=-1)
        return rows.mean() if mask is None else (rows * mask).sum() / mask.sum()

    race(
        bench,
        "hidden_losses",
        {"loss": f"hidden_{kind}", "masked": masked, "dtype": str(dtype)[6:]},
        student,
        lambda leaves: op(leaves, teacher, mask),
        lambda leaves: torch.stack([of_layer(s, t) for s, t in zip(leaves, teacher, strict=True)]).mean(),
        lambda leaves: op(leaves, [t.double() for t in teacher], mask),
    )


def eager_maps(kind: str, sides: list[list[Tensor]], mask: Tensor | None) -> Tensor:
    """The maps stored whole: softmax of the scores, padded keys at the dtype's least."""
    student, teacher = (q @ k.mT * q.shape[-1] ** -0.5 for q, k in sides)
    if mask is not None:
        padding = torch.zeros(mask.shape, dtype=student.dtype).masked_fill(~mask, torch.finfo(student.dtype).min)
        student, teacher = (scores + padding[:, None, None, :] for scores in (student, teacher))
    if kind == "attention_mse":
        squares = (F.softmax(student, -1) - F.softmax(teacher, -1)).square()
        if mask is None:
            return squares.mean()
        queries = mask[:, None, :, None]
        return (squares * queries).sum() / (HEADS * mask.sum(-1).square().sum())
    rows = F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1), reduction="none").sum(-1)
    return rows.mean() if mask is None else (rows * mask[:, None, :]).sum() / (HEADS * mask.sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seq", [128, 384])
@pytest.mark.parametrize("kind", ["attention_kl", "attention_mse", "relation_kl"])
def test_attention_maps(bench: Any, kind: str, seq: int, masked: bool, dtype: torch.dtype) -> None:
    def projected() -> Tensor:
        return torch.randn(BATCH, seq, WIDTH).to(dtype).view(BATCH, seq, HEADS, WIDTH // HEADS).transpose(1, 2)

    one = kind == "relation_kl"
    student = [projected().requires_grad_() for _ in range(1 if one else 2)]
    teacher = [projected() for _ in student]
    mask = tokens_of(seq) if masked else None
    op: Callable[..., Tensor] = {"attention_kl": attention_kl, "attention_mse": attention_mse}.get(kind, relation_kl)

    race(
        bench,
        "attention_losses",
        {"loss": kind, "seq": seq, "masked": masked, "dtype": str(dtype)[6:]},
        student,
        lambda leaves: op(*leaves, *teacher, mask),
        lambda leaves: eager_maps(kind, [leaves * 2 if one else leaves, teacher * 2 if one else teacher], mask),
        lambda leaves: op(*leaves, *[t.double() for t in teacher], mask),
    )
