from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.losses import Case, LossPromises
from torch import Tensor
from torch.nn import functional as F

from sparsebert import _load
from sparsebert.ops import attention_kl


def scores(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """The usual way to them: padded keys at -inf, in every row."""
    found = q @ k.mT * q.shape[-1] ** -0.5
    return found if mask is None else found.masked_fill(~mask[:, None, None, :], -torch.inf)


def mean_over_queries(rows: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return rows.mean()
    return rows[mask[:, None, :].expand(rows.shape)].mean()


def by_kl_div(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    log_student, log_teacher = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    rows = log_teacher.exp() * (log_teacher - log_student)
    if mask is not None:
        rows = rows.masked_fill(~mask[:, None, None, :], 0.0)  # -inf - -inf
    return mean_over_queries(rows.sum(-1), mask)


class TestAttentionKl(LossPromises):
    name = "attention_kl"
    floor = torch.finfo(torch.float32).eps
    # batch, heads, seq, the student's width, the teacher's
    sizes: Any = (
        (1, 1, 1, 2, 2), (2, 3, 5, 4, 8), (1, 2, 6, 3, 1), (2, 1, 16, 16, 16), (2, 2, 17, 20, 33), (1, 3, 48, 8, 4),
        (2, 1, 49, 33, 64), (1, 1, 100, 64, 64), (1, 2, 131, 100, 12),
    )  # fmt: skip
    large: Any = (3, 4, 70, 32, 64)
    small = (2, 2, 4, 3, 5)
    separate = True
    """q and k are two tensors."""

    def shapes(self, size: tuple[int, ...]) -> Any:
        batch, heads, seq, student, teacher = size
        count = 2 if self.separate else 1
        return [(batch, heads, seq, student)] * count, [(batch, heads, seq, teacher)] * count, (batch, seq)

    def loss(self, case: Case) -> Tensor:
        return self.loss_of(*case.student, *case.teacher, case.mask)

    def loss_of(self, *arguments: Any, **named: Any) -> Tensor:
        return attention_kl(*arguments, **named)

    def plain(self, case: Case) -> Tensor:
        return by_kl_div(scores(*case.student, case.mask), scores(*case.teacher, case.mask), case.mask)

    def arguments(self, case: Case) -> tuple[Any, ...]:
        return *case.student, *case.teacher, case.mask, 0.5, 0.7

    def token(self, tensor: Tensor, index: tuple[int, ...]) -> Tensor:
        return tensor[index[0], :, index[1]]

    def test_a_whole_sequence_left_out_does_not_count(self, backend: str) -> None:
        case = self.make((3, 2, 5, 4, 4))
        assert case.mask is not None
        case.mask[1] = False
        case.mask[2, 0] = True
        loss, *gradients = self.run(case)
        usual, *truth = self.run(Case(case.student, case.teacher, case.mask), self.without_empty)
        torch.testing.assert_close(loss, usual)
        for gradient, true in zip(gradients, truth, strict=True):
            assert not gradient[1].any()
            torch.testing.assert_close(gradient, true, rtol=1e-5, atol=1e-7)

    def without_empty(self, case: Case) -> Tensor:
        assert case.mask is not None
        some = case.mask.any(-1)
        return self.plain(Case([s[some] for s in case.student], [t[some] for t in case.teacher], case.mask[some]))

    def test_a_long_sequence_in_small_blocks(self, within: Any) -> None:
        self.compare(within, self.make((1, 1, 2900, 4, 4), share=0.9))

    def test_a_short_sequence_beside_a_long_one(self, within: Any) -> None:
        # The longest sequence is not the one that needs most memory.
        case = self.make((2, 1, 1500, 4, 4), share=1.0)
        assert case.mask is not None
        case.mask[0, 1340:] = False
        self.compare(within, case)

    def test_the_scale(self, backend: str) -> None:
        case = self.make(self.small, share=None)
        student, teacher = ([x * 1.3 for x in side] for side in (case.student, case.teacher))
        loss = self.loss_of(*student, *teacher, None, scale=0.4)
        other = self.loss_of(*case.student, *case.teacher, None, scale=0.4 * 1.3**2)
        torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-6)
        # One scale for both: the default is each width's own.
        teacher = [x * (3 / 5) ** 0.25 for x in case.teacher]
        own, same = (
            self.loss_of(*case.student, *case.teacher, None),
            self.loss_of(*case.student, *teacher, None, scale=3**-0.5),
        )
        torch.testing.assert_close(own, same, rtol=1e-5, atol=1e-6)

    def test_gradients_are_laid_out_as_projections_want_them(self, backend: str) -> None:
        batch, heads, seq, width, other = self.small
        projected = [torch.randn(batch, seq, heads * width, requires_grad=True) for _ in self.make(self.small).student]
        teacher = [torch.randn(batch, heads, seq, other) for _ in projected]
        views = [x.view(batch, seq, heads, width).transpose(1, 2) for x in projected]
        gradients = torch.autograd.grad(self.loss_of(*views, *teacher, None), views)
        assert all(g.transpose(1, 2).is_contiguous() for g in gradients)


def quadruple(**change: Any) -> dict[str, Any]:
    names = ("student_q", "student_k", "teacher_q", "teacher_k")
    return {**{name: torch.zeros(2, 3, 4, 5) for name in names}, **change}


WRONG = [
    ({"student_q": torch.zeros(3, 4, 5)}, ValueError, r"student_q: expected \[batch, heads, seq, width\]"),
    ({"student_k": torch.zeros(2, 3, 4, 6)}, ValueError, r"student_k: expected \[2, 3, 4, 5\] like student_q, got"),
    ({"student_k": torch.zeros(2, 3, 3, 5)}, ValueError, r"student_k: expected \[2, 3, 4, 5\] like student_q, got"),
    ({"student_k": torch.zeros(2, 3, 4, 5).double()}, ValueError, "student_k: expected torch.float32 like student_q"),
    (
        {"teacher_q": torch.zeros(2, 6, 4, 5)},
        ValueError,
        r"teacher_q: expected \[2, 3, 4, 5\] like student_q, but for the width, got \[2, 6, 4, 5\]",
    ),
    ({"teacher_k": torch.zeros(2, 3, 4, 6)}, ValueError, r"teacher_k: expected \[2, 3, 4, 5\] like teacher_q, got"),
    ({"teacher_k": torch.zeros(2, 3, 4, 5).long()}, TypeError, "teacher_k: expected a float tensor, got torch.int64"),
    ({"teacher_q": torch.zeros(2, 3, 4, 5, device="meta")}, ValueError, "teacher_q: expected on cpu like student_q"),
    ({"student_q": torch.zeros(2, 3, 4, 0)}, ValueError, "student_q: expected .*, width >= 1"),
    ({"token_mask": torch.ones(2, 4)}, ValueError, r"token_mask: expected bool \[2, 4\], got torch.float32"),
    ({"token_mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, r"token_mask: expected bool \[2, 4\]"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_what_does_not_fit_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention_kl(**quadruple(**change))


def refuse_direct_calls(name: str, *after_mask: Any) -> None:
    """What Python checks, the op checks again."""
    if _load.missing("cpu") is not None:
        pytest.skip("no compiled CPU kernels")
    op, x = getattr(torch.ops.sparsebert, name), torch.zeros(2, 3, 4, 5)
    for change in (
        {"student_q": x[0]},
        {"student_k": x[:1]},
        {"student_k": x[..., :4]},
        {"student_k": x.bfloat16()},
        {"teacher_q": x[:, :2]},
        {"teacher_k": x[:, :, :3]},
        {"teacher_k": x[..., :3]},
        {"teacher_q": torch.zeros(2, 3, 4, 10)[..., ::2]},
        {"student_q": x.double(), "student_k": x.double()},
        {"teacher_q": x.half(), "teacher_k": x.half()},
        {"mask": torch.ones(2, 3, dtype=torch.bool)},
        {"mask": torch.ones(2, 4)},
        {"mask": torch.ones(4, 2, dtype=torch.bool).t()},
    ):
        arguments = {"student_q": x, "student_k": x, "teacher_q": x, "teacher_k": x, "mask": None, **change}
        with pytest.raises(RuntimeError, match="expected"):
            op(*arguments.values(), 1.0, 1.0, *after_mask, True)


def test_a_direct_call_of_the_op_cannot_read_out_of_bounds() -> None:
    refuse_direct_calls("attention_kl")


def test_equal_maps_have_no_loss_and_no_gradient(isa: str) -> None:
    q, k = (torch.randn(2, 3, 37, 16, requires_grad=True) for _ in range(2))
    loss = attention_kl(q, k, q, k)
    assert abs(loss.item()) < 1e-12
    assert all(g.abs().max() < 1e-8 for g in torch.autograd.grad(loss, (q, k)))


def test_large_scores(isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, 2, 20, 16, generator=generator) * 10 for _ in range(4)]
    student = [x.requires_grad_() for x in leaves[:2]]
    loss = attention_kl(*student, *leaves[2:])
    exact = [x.detach().double().requires_grad_() for x in student]
    truth = by_kl_div(scores(*exact, None), scores(*[x.double() for x in leaves[2:]], None), None)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    pairs = zip(torch.autograd.grad(loss, student), torch.autograd.grad(truth, exact), strict=True)
    for one, other in pairs:
        assert (one.double() - other).abs().max() < 1e-4 * other.abs().max()
