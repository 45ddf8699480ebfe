from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.losses import Case
from torch import Tensor

from sparsebert import _load
from sparsebert.ops import attention_kl, relation_kl
from tests.ops.test_attention_kl import TestAttentionKl as OnMaps
from tests.ops.test_attention_kl import by_kl_div, scores


class TestRelationKl(OnMaps):
    name = "relation_kl"
    separate = False
    spread = 0.7  # or every token would be related to itself alone

    def loss_of(self, *arguments: Any, **named: Any) -> Tensor:
        return relation_kl(*arguments, **named)

    def plain(self, case: Case) -> Tensor:
        student, teacher = (scores(side[0], side[0], case.mask) for side in (case.student, case.teacher))
        return by_kl_div(student, teacher, case.mask)


def test_it_is_attention_whose_queries_and_keys_are_one(backend: str) -> None:
    x = torch.randn(2, 3, 9, 8, requires_grad=True)
    teacher = torch.randn(2, 3, 9, 4)
    mask = torch.rand(2, 9) < 0.7
    losses = [relation_kl(x, teacher, mask), attention_kl(x, x, teacher, teacher, mask)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in losses), rtol=1e-5, atol=1e-7)


def test_relation_heads_cut_the_width_anew(backend: str) -> None:
    # A student of 4 attention heads of 6, a teacher of 2 of 18, 3 relation heads.
    student, teacher = torch.randn(2, 7, 24, requires_grad=True), torch.randn(2, 7, 36)

    def cut(x: Tensor, heads: int) -> Tensor:
        return x.view(2, 7, heads, -1).transpose(1, 2)

    losses = [
        relation_kl(student, teacher, heads=3),
        relation_kl(cut(student, 4), cut(teacher, 2), heads=3),
        relation_kl(cut(student, 3), teacher),
        by_kl_div(scores(*[cut(student, 3)] * 2, None), scores(*[cut(teacher, 3)] * 2, None), None),
    ]
    gradients = [torch.autograd.grad(loss, student)[0] for loss in losses]
    for loss, gradient in zip(losses, gradients, strict=True):
        torch.testing.assert_close(loss, losses[-1])
        torch.testing.assert_close(gradient, gradients[-1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student": torch.zeros(2, 8).long()}, TypeError, "student: expected a float tensor, got torch.int64"),
        ({"student": torch.zeros(2, 8)}, ValueError, r"student: expected \[batch, \(heads,\) seq, width\]"),
        ({"heads": None}, ValueError, r"heads: needed where student is \[batch, seq, width\], here \[2, 5, 8\]"),
        ({"heads": 3}, ValueError, "heads: expected a divisor of student's width 8, got 3"),
        ({"heads": 0}, ValueError, "heads: expected a divisor of student's width 8, got 0"),
        ({"heads": 8}, ValueError, "heads: expected a divisor of teacher's width 12, got 8"),
        ({"teacher": torch.zeros(2, 4, 12)}, ValueError, "teacher: expected batch 2 and seq 5 like student, got"),
        ({"teacher": torch.zeros(2, 5, 12, device="meta")}, ValueError, "teacher: expected on cpu like student"),
        ({"token_mask": torch.ones(2, 8, dtype=torch.bool)}, ValueError, r"token_mask: expected bool \[2, 5\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"student": torch.zeros(2, 5, 8), "teacher": torch.zeros(2, 5, 12), "heads": 4}
    with pytest.raises(error, match=message):
        relation_kl(**{**arguments, **change})


def test_a_direct_call_of_the_op_cannot_read_out_of_bounds() -> None:
    if _load.missing("cpu") is not None:
        pytest.skip("no compiled CPU kernels")
    op, x = torch.ops.sparsebert.relation_kl, torch.zeros(2, 3, 4, 5)
    for student, teacher, mask in (
        (x[0], x, None),
        (x, x[:1], None),
        (x, x[:, :, :3], None),
        (x[..., ::2], x, None),
        (x.double(), x, None),
        (x, x.half(), None),
        (x, x, torch.ones(2, 3, dtype=torch.bool)),
        (x, x, torch.ones(2, 4)),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            op(student, teacher, mask, 1.0, 1.0, True)


def test_equal_relations_have_no_loss_and_no_gradient(isa: str) -> None:
    x = torch.randn(2, 3, 37, 16, requires_grad=True)
    loss = relation_kl(x, x)
    assert abs(loss.item()) < 1e-12 and torch.autograd.grad(loss, x)[0].abs().max() < 1e-8
