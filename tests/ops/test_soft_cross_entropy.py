from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.losses import Case, LossPromises, Within
from torch import Tensor
from torch.nn import functional as F

from sparsebert.ops import soft_cross_entropy

T = 1.7


class TestSoftCrossEntropy(LossPromises):
    name = "soft_cross_entropy"
    # Probabilities near 1, of three or four roundings each, are subtracted.
    gradient_floor = 4 * T * 2.0**-24
    sizes = (
        (1, 1, 1), (2, 3, 2), (5, 1, 3), (3, 7, 4), (1, 2, 15), (2, 2, 16), (3, 3, 17), (2, 8, 28), (4, 4, 31),
        (2, 2, 32), (2, 3, 33), (1, 3, 100), (2, 1, 1024), (1, 2, 1025), (1, 2, 2500),
    )  # fmt: skip
    large = (9, 40, 1100)
    small = (2, 3, 5)

    def shapes(self, size: tuple[int, ...]) -> Any:
        return [size], [size], size[:-1]

    def loss(self, case: Case) -> Tensor:
        return soft_cross_entropy(case.student[0], case.teacher[0], case.mask, temperature=T)

    def plain(self, case: Case) -> Tensor:
        student, teacher = case.student[0] / T, case.teacher[0] / T
        rows = -(F.softmax(teacher, -1) * F.log_softmax(student, -1)).sum(-1)
        return (rows if case.mask is None else rows[case.mask]).mean() * T**2

    def arguments(self, case: Case) -> tuple[Any, ...]:
        return case.student[0], case.teacher[0], case.mask, T

    def token(self, tensor: Tensor, index: tuple[int, ...]) -> Tensor:
        return tensor[index]


def test_the_gradient_is_that_of_the_kl_divergence_and_the_loss_that_of_class_labels() -> None:
    student, teacher = torch.randn(6, 9, requires_grad=True), torch.randn(6, 9)
    kl = F.kl_div(F.log_softmax(student / 2, -1), F.softmax(teacher / 2, -1), reduction="batchmean") * 4
    loss = soft_cross_entropy(student, teacher, temperature=2.0)
    entropy = torch.distributions.Categorical(logits=teacher / 2).entropy().mean()
    torch.testing.assert_close(loss, kl + 4 * entropy)
    gradients = [torch.autograd.grad(one, student)[0] for one in (loss, kl)]
    torch.testing.assert_close(*gradients)
    labels = torch.randint(9, (6,))
    certain = torch.full((6, 9), -torch.inf).scatter(1, labels[:, None], 0.0)
    torch.testing.assert_close(soft_cross_entropy(student, certain), F.cross_entropy(student, labels))


@pytest.mark.parametrize("classes", [7, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teachers_class_at_minus_infinity_has_probability_0(isa: str, classes: int, dtype: torch.dtype) -> None:
    student, teacher = torch.randn(5, classes, dtype=dtype), torch.randn(5, classes, dtype=dtype)
    teacher[:, 2:] = -torch.inf  # whole blocks of nothing else, too
    student.requires_grad_()
    loss = soft_cross_entropy(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    exact = student.detach().double().requires_grad_()
    truth = -(F.softmax(teacher.double(), -1) * F.log_softmax(exact, -1)).sum(-1).mean()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    (true_gradient,) = torch.autograd.grad(truth, exact)
    rtol = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=rtol, atol=1e-6)
    with torch.no_grad():
        student[:, :] = -torch.inf
    assert not soft_cross_entropy(student, teacher).isfinite()


@pytest.mark.parametrize("classes", [5, 2500])
@pytest.mark.parametrize("shift", [-3e4, 3e4, 1e30])
def test_huge_and_far_apart_logits(isa: str, within: Within, classes: int, shift: float) -> None:
    student, teacher = torch.randn(4, classes) * 100, torch.randn(4, classes) * 100
    student[1] += shift
    teacher[2] += shift
    student[3, 1] = teacher[3, 2] = shift
    student.requires_grad_()
    loss = soft_cross_entropy(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    exact = student.detach().double().requires_grad_()
    truth = -(F.softmax(teacher.double(), -1) * F.log_softmax(exact, -1)).sum(-1).mean()
    (true_gradient,) = torch.autograd.grad(truth, exact)
    # Where both put all on one class, the loss is next to 0 and its roundings are not.
    torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-5, atol=1e-6)
    within(gradient, true_gradient.float(), true_gradient, 1.0, tiny=True)


def test_the_gradient_from_bf16_logits_is_within_half_a_percent(isa: str) -> None:
    student = (torch.randn(8, 30522) * 3).bfloat16().requires_grad_()
    teacher = (torch.randn(8, 30522) * 3).bfloat16()
    (gradient,) = torch.autograd.grad(soft_cross_entropy(student, teacher, temperature=2.0), student)
    exact = student.detach().double().requires_grad_()
    loss = -(F.softmax(teacher.double() / 2, -1) * F.log_softmax(exact / 2, -1)).sum(-1).mean() * 4
    (truth,) = torch.autograd.grad(loss, exact)
    assert (gradient.double() - truth).norm() / truth.norm() < 0.005


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"teacher_logits": torch.zeros(2, 4)}, ValueError, r"teacher_logits: expected \[2, 3\] like student_logits"),
        ({"student_logits": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "student_logits: expected a float"),
        ({"teacher_logits": torch.zeros(2, 3, device="meta")}, ValueError, "teacher_logits: expected on cpu"),
        (
            {"mask": torch.ones(2, dtype=torch.int64)},
            ValueError,
            r"mask: expected bool \[2\], got torch.int64 \[2\]; a",
        ),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask: expected bool \[2\], got torch.bool \[3\]$"),
        ({"mask": torch.ones(2, dtype=torch.bool, device="meta")}, ValueError, "mask: expected on cpu"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive number, got 0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature: expected a positive number, got nan"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        soft_cross_entropy(**{"student_logits": torch.zeros(2, 3), "teacher_logits": torch.zeros(2, 3), **change})


def test_logits_without_a_class_are_named() -> None:
    for shape in ((), (3, 0)):
        with pytest.raises(ValueError, match="student_logits: expected"):
            soft_cross_entropy(torch.zeros(shape), torch.zeros(shape))


def test_a_direct_call_of_the_op_cannot_read_out_of_bounds() -> None:
    from sparsebert import _load

    if _load.missing("cpu") is not None:
        pytest.skip("no compiled CPU kernels")
    op, logits = torch.ops.sparsebert.soft_cross_entropy, torch.zeros(4, 5)
    for arguments in (
        (logits, torch.zeros(3, 5), None, 1.0),
        (logits, torch.zeros(5, 4), None, 1.0),
        (logits, torch.zeros(5, 4).t(), None, 1.0),
        (logits, logits.double(), None, 1.0),
        (logits, logits.half(), None, 1.0),
        (logits, logits, torch.ones(3, dtype=torch.bool), 1.0),
        (logits, logits, torch.ones(4, dtype=torch.uint8), 1.0),
        (logits, logits, None, -1.0),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            op(*arguments, True)
