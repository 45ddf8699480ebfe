from __future__ import annotations

import pytest
import torch
from gpu.map_losses import MapPromises
from ops import test_attention_mse as on_cpu


class TestOnProbabilities(MapPromises):
    of = on_cpu.TestOnProbabilities()


class TestOnScores(MapPromises):
    of = on_cpu.TestOnScores()


@pytest.mark.parametrize("apart", [1.0, 1e-3])
def test_the_row_term_of_peaked_and_of_nearly_equal_maps(triton_backend: torch.device, apart: float) -> None:
    # delta is a difference of two sums: of maps that are nearly one-hot, and of maps that are nearly equal.
    generator = torch.Generator().manual_seed(0)
    q, k = (2 * torch.randn(1, 2, 60, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    teacher = [x + apart * torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (q, k)]
    of = on_cpu.TestOnProbabilities()
    student, teacher = ([x.float().to(triton_backend) for x in side] for side in ((q, k), teacher))
    case = on_cpu.Case([x.requires_grad_() for x in student], teacher, None)
    wide = on_cpu.Case([x.detach().double().requires_grad_() for x in student], [x.double() for x in teacher], None)
    results, usual, exact = of.run(case), of.run(case, of.plain), of.run(wide, of.plain)
    for result, own, truth in zip(results[1:], usual[1:], exact[1:], strict=True):
        assert (result.double() - truth).norm() <= 3 * (own.double() - truth).norm() + 1e-6 * truth.norm()
    torch.testing.assert_close(results[0].double(), exact[0], rtol=1e-3, atol=0.0)


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
