from __future__ import annotations

import pytest
import torch
from gpu.row_losses import RowPromises
from ops import test_soft_cross_entropy as on_cpu
from torch.nn import functional as F

from sparsebert.ops import soft_cross_entropy


class TestSoftCrossEntropy(RowPromises):
    of = on_cpu.TestSoftCrossEntropy()
    # Rows of 8,192 classes and fewer are held whole, longer ones are walked.
    sizes = ((1, 1, 1), (2, 3, 2), (5, 1, 3), (3, 7, 16), (2, 2, 100), (2, 2, 1000), (1, 2, 8193), (2, 2, 9000))
    small = (2, 3, 5)


@pytest.mark.parametrize("classes", [5, 9000])
@pytest.mark.parametrize("shift", [-3e4, 3e4, 1e30])
def test_huge_and_far_apart_logits(triton_backend: torch.device, classes: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, classes, generator=generator) * 10 for _ in range(2))
    student[1] += shift
    teacher[2] += shift
    student[3, 1] = teacher[3, 2] = shift
    student[4, 0] = -1e4
    student, teacher = student.to(triton_backend).requires_grad_(), teacher.to(triton_backend)
    loss = soft_cross_entropy(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    exact = student.detach().double().requires_grad_()
    truth = -(F.softmax(teacher.double(), -1) * F.log_softmax(exact, -1)).sum(-1).mean()
    (true_gradient,) = torch.autograd.grad(truth, exact)
    torch.testing.assert_close(loss.double(), truth.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("classes", [7, 9000])
def test_a_teachers_class_at_minus_infinity_has_probability_0(triton_backend: torch.device, classes: int) -> None:
    student, teacher = torch.randn(3, classes), torch.randn(3, classes)
    teacher[:, 2:] = -torch.inf  # whole tiles of nothing else, too
    teacher[0] = torch.cat([torch.full((classes - 3,), -torch.inf), torch.randn(3)])
    student = student.to(triton_backend).requires_grad_()
    loss = soft_cross_entropy(student, teacher.to(triton_backend))
    truth = -(F.softmax(teacher.double(), -1) * F.log_softmax(student.detach().cpu().double(), -1)).sum(-1).mean()
    torch.testing.assert_close(loss.cpu().double(), truth, rtol=1e-5, atol=0)


def test_tiles_and_cost() -> None:
    from sparsebert.kernels.soft_cross_entropy import cost, tiles

    assert tiles(2, 4).rows == 1024 and tiles(2, 4).resident
    assert tiles(8192, 8).resident and not tiles(8193, 4).resident
    # 16,384 rows of 30,522 classes at 6 bytes, and one float a program, written and read again.
    found = cost(16384, 30522)
    assert (found.read, found.written) == (16384 * 30522 * 4 + 4 * 16384, 16384 * 30522 * 2 + 4 * 16384 + 4)
    assert found.launches == 2 and cost(5, 3, masked=True).launches == 3
    small = cost(100, 3, 4, 4, need_grad=False, masked=True)
    assert (small.read, small.written) == (100 * 3 * 8 + 100 + 4 + 100, 4 + 4 + 8)
