from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.losses import Case
from torch import Tensor
from torch.nn import functional as F

from sparsebert.errors import UserError
from sparsebert.ops import attention_mse
from tests.ops.test_attention_kl import WRONG, quadruple, refuse_direct_calls, scores
from tests.ops.test_attention_kl import TestAttentionKl as OnMaps


def mean_over_pairs(difference: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return difference.square().mean()
    pairs = mask[:, None, :, None] & mask[:, None, None, :]
    return difference[pairs.expand(difference.shape)].square().mean()


class TestOnProbabilities(OnMaps):
    name = "attention_mse"
    floor = 0.0
    on = "probabilities"

    def loss_of(self, *arguments: Any, **named: Any) -> Tensor:
        return attention_mse(*arguments, on=self.on, **named)

    def plain(self, case: Case) -> Tensor:
        maps = [F.softmax(scores(*side, case.mask), -1) for side in (case.student, case.teacher)]
        return mean_over_pairs(maps[0] - maps[1], case.mask)

    def arguments(self, case: Case) -> tuple[Any, ...]:
        return *super().arguments(case), self.on == "scores"


class TestOnScores(TestOnProbabilities):
    on = "scores"

    def plain(self, case: Case) -> Tensor:
        return mean_over_pairs(scores(*case.student, None) - scores(*case.teacher, None), case.mask)


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_what_does_not_fit_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention_mse(**quadruple(**change))


def test_an_unknown_word_is_named() -> None:
    with pytest.raises(UserError, match="score"):
        attention_mse(**quadruple(), on="score")


@pytest.mark.parametrize("on_scores", [True, False])
def test_a_direct_call_of_the_op_cannot_read_out_of_bounds(on_scores: bool) -> None:
    refuse_direct_calls("attention_mse", on_scores)


@pytest.mark.parametrize("on", ["probabilities", "scores"])
def test_equal_maps_have_no_loss_and_no_gradient(isa: str, on: str) -> None:
    q, k = (torch.randn(2, 3, 37, 16, requires_grad=True) for _ in range(2))
    loss = attention_mse(q, k, q, k, on=on)
    assert abs(loss.item()) < 1e-12
    assert all(g.abs().max() < 1e-8 for g in torch.autograd.grad(loss, (q, k)))
