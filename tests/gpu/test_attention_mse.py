from __future__ import annotations

import pytest
import torch
from gpu.map_losses import MapPromises
from ops import test_attention_mse as on_cpu

from sparsebert.ops import attention_mse


class Milder(on_cpu.TestOnProbabilities):
    # Of a score of 50 the rounding alone, made anew in every pass, is 1e-5 of a probability.
    spread = 0.7


class TestOnProbabilities(MapPromises):
    of = Milder()


class TestOnScores(MapPromises):
    of = on_cpu.TestOnScores()


@pytest.mark.parametrize("apart", [1.0, 1e-3])
def test_the_row_term_of_peaked_and_of_nearly_equal_maps(triton_backend: torch.device, apart: float) -> None:
    # delta is a difference of two sums: of maps that are nearly one-hot, and of maps that are nearly equal.
    generator = torch.Generator().manual_seed(0)
    q, k = (2 * torch.randn(1, 2, 60, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    teacher = [x + apart * torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (q, k)]
    plain = on_cpu.TestOnProbabilities()
    case = on_cpu.Case([q.requires_grad_(), k.requires_grad_()], teacher, None)
    exact = plain.run(case, plain.plain)
    arguments = [x.detach().float().to(triton_backend) for x in (q, k, *teacher)]
    leaves = [x.requires_grad_() for x in arguments[:2]]
    loss = attention_mse(*leaves, *arguments[2:])
    results = (loss, *torch.autograd.grad(loss, leaves))
    for result, truth in zip(results, exact, strict=True):
        assert (result.cpu().double() - truth).norm() <= 1e-3 * truth.norm()


def test_cost_counts_what_is_launched() -> None:
    from sparsebert.kernels.attention_mse import cost

    pairs, rows = 6 * 128 * 128, 600
    found = cost(2, 3, 100, 20, 64, masked=False)
    assert found.flops == 2 * pairs * (3 * (32 + 64) + 2 * 32)
    inputs, stats = 2 * rows * (20 + 64) * 2, 4 * 5 * rows
    assert found.read == 3 * inputs + 2 * stats + 4 * 12
    on_scores = cost(2, 3, 100, 20, 64, masked=False, on_scores=True)
    assert on_scores.flops == 2 * pairs * (2 * (32 + 64) + 2 * 32)
    assert (on_scores.read, on_scores.launches) == (2 * inputs + 4 * 12, 3)
