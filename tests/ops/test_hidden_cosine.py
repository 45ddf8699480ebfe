from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.losses import Case
from torch import Tensor
from torch.nn import functional as F

from sparsebert.ops import hidden_cosine
from tests.ops.test_hidden_mse import TestHiddenMse as OnHiddenStates


class TestHiddenCosine(OnHiddenStates):
    name = "hidden_cosine"
    floor = torch.finfo(torch.float32).eps
    # layers, batch, seq, width: vectors of a number or two may well be nearly parallel, a loss of nearly 0
    sizes = ((1, 1, 1, 8), (2, 2, 3, 5), (3, 1, 4, 16), (2, 3, 5, 33), (1, 2, 9, 64), (4, 2, 3, 100), (2, 1, 7, 2100))

    def loss(self, case: Case) -> Tensor:
        return hidden_cosine(case.student, case.teacher, case.mask)

    def loss_of(self, student: Any, teacher: Any, mask: Any = None) -> Tensor:
        return hidden_cosine(student, teacher, mask)

    def plain(self, case: Case) -> Tensor:
        pairs = zip(case.student, case.teacher, strict=True)
        rows = torch.stack([1 - F.cosine_similarity(s, t, dim=-1) for s, t in pairs])
        return (rows if case.mask is None else rows[:, case.mask]).mean()


def test_equal_and_opposite_states() -> None:
    states = torch.randn(2, 5, 64, requires_grad=True)
    for factor, truth in ((1.0, 0.0), (3.0, 0.0), (-2.0, 2.0)):
        loss = hidden_cosine(states, states.detach() * factor)
        (gradient,) = torch.autograd.grad(loss, states)
        assert abs(loss.item() - truth) < 1e-6 and gradient.abs().max() < 1e-7


def test_a_state_of_zeros_is_taken_as_torch_takes_it(backend: str) -> None:
    student, teacher = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    student[0, 0] = teacher[0, 1] = 0.0
    student.requires_grad_()
    loss = hidden_cosine(student, teacher)
    usual = (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()
    torch.testing.assert_close(loss, usual)
    gradients = [torch.autograd.grad(one, student)[0] for one in (loss, usual)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_a_length_taken_for_another_is_a_constant(backend: str) -> None:
    student, teacher = (torch.randn(1, 1, 8) * 1e-10).requires_grad_(), torch.randn(1, 1, 8)
    loss = hidden_cosine(student, teacher)
    torch.testing.assert_close(loss, (1 - F.cosine_similarity(student, teacher, dim=-1)).mean())
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, -teacher / teacher.norm() * 1e8)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_lengths_do_not_matter(backend: str, scale: float) -> None:
    student, teacher = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    if scale > 1:
        torch.testing.assert_close(hidden_cosine(student * scale, teacher), hidden_cosine(student, teacher))
    torch.testing.assert_close(hidden_cosine(student, teacher * 2), hidden_cosine(student, teacher))
