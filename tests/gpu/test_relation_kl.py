from __future__ import annotations

import torch
from gpu.map_losses import MapPromises
from ops import test_relation_kl as on_cpu

from sparsebert.ops import relation_kl


class TestRelationKl(MapPromises):
    of = on_cpu.TestRelationKl()


def test_relation_heads_cut_the_width_anew(triton_backend: torch.device) -> None:
    # A student of 4 attention heads of 6, a teacher of 2 of 18, 3 relation heads.
    student = torch.randn(2, 4, 7, 6, device=triton_backend, requires_grad=True)
    teacher = torch.randn(2, 2, 7, 18, device=triton_backend)

    def cut(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).flatten(2).unflatten(-1, (3, -1)).transpose(1, 2)

    plain = on_cpu.by_kl_div(
        on_cpu.scores(cut(student), cut(student), None), on_cpu.scores(cut(teacher), cut(teacher), None), None
    )
    loss = relation_kl(student, teacher, heads=3)
    torch.testing.assert_close(loss, plain)
    gradients = [torch.autograd.grad(x, student)[0] for x in (loss, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_cost_counts_what_is_launched() -> None:
    from sparsebert.kernels.relation_kl import cost

    pairs, rows = 6 * 128 * 128, 600
    found = cost(2, 3, 100, 20, 64, masked=False)
    # Statistics, then the loss and the whole gradient.
    assert found.flops == 2 * pairs * (2 * (32 + 64) + 32)
    assert found.read == 2 * rows * (20 + 64) * 2 + 4 * 4 * rows + 4 * 12
    assert (found.written, found.launches) == (4 * 4 * rows + 4 * 12 + rows * 20 * 2 + 4, 3)
