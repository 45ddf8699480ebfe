from __future__ import annotations

import torch
from gpu.row_losses import RowPromises
from ops import test_hidden_cosine as on_cpu
from torch.nn import functional as F

from sparsebert.ops import hidden_cosine


class TestHiddenCosine(RowPromises):
    of = on_cpu.TestHiddenCosine()
    # layers, batch, seq, width; wider than what is held at a time
    sizes = ((1, 1, 1, 8), (2, 2, 3, 5), (3, 1, 4, 16), (35, 1, 3, 8), (2, 1, 7, 2100), (3, 2, 9, 96))
    small = (2, 2, 4, 6)


def test_a_state_of_zeros_and_a_tiny_one_are_taken_as_torch_takes_them(triton_backend: torch.device) -> None:
    student, teacher = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    student[0, 0] = teacher[0, 1] = 0.0
    student[0, 2] *= 1e-10
    student = student.to(triton_backend).requires_grad_()
    teacher = teacher.to(triton_backend)
    loss = hidden_cosine(student, teacher)
    usual = (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()
    torch.testing.assert_close(loss, usual)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient[0, 2], -teacher[0, 2] / teacher[0, 2].norm() * 1e8 / 4)
    (others,) = torch.autograd.grad(usual, student)
    torch.testing.assert_close(gradient[0, [0, 1, 3]], others[0, [0, 1, 3]], rtol=1e-5, atol=1e-6)


def test_cost_counts_each_state_once() -> None:
    from sparsebert.kernels.hidden_cosine import cost

    found = cost(2, 100, 768, masked=False)
    assert (found.launches, found.read) == (2, 2 * 100 * 768 * 4 + 4 * 2 * 25)
    assert found.written == 2 * 100 * 768 * 2 + 4 * 2 * 25 + 4
