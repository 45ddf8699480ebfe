from __future__ import annotations

import torch
from gpu.map_losses import MapPromises
from ops import test_attention_kl as on_cpu

from sparsebert.ops import attention_kl


class TestAttentionKl(MapPromises):
    of = on_cpu.TestAttentionKl()


def test_large_scores(triton_backend: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [(torch.randn(1, 2, 20, 16, generator=generator) * 10).to(triton_backend) for _ in range(4)]
    student = [x.requires_grad_() for x in leaves[:2]]
    loss = attention_kl(*student, *leaves[2:])
    exact = [x.detach().double().requires_grad_() for x in student]
    truth = on_cpu.by_kl_div(on_cpu.scores(*exact, None), on_cpu.scores(*[x.double() for x in leaves[2:]], None), None)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    for one, other in zip(torch.autograd.grad(loss, student), torch.autograd.grad(truth, exact), strict=True):
        assert (one.double() - other).abs().max() < 1e-4 * other.abs().max()


def test_cost_counts_what_is_launched() -> None:
    from sparsebert.kernels.attention_kl import cost

    # 2 sequences x 3 heads of 100 tokens: 2 tiles of 64 by 2 steps of 64, so 128 x 128 pairs each; widths 20 -> 32 and
    # 64. Statistics 2 products; rows and columns those and one with the student's width.
    pairs, rows = 6 * 128 * 128, 600
    found = cost(2, 3, 100, 20, 64)
    assert found.flops == 2 * pairs * (3 * (32 + 64) + 2 * 32)
    inputs, stats, partial, mask = 2 * rows * (20 + 64) * 2, 4 * 4 * rows, 4 * 12, 200
    assert found.read == 3 * (inputs + mask) + 2 * stats + partial + mask
    assert found.written == stats + partial + 2 * rows * 20 * 2 + 4 + 16
    assert found.launches == 5
    forward = cost(2, 3, 100, 20, 64, need_grad=False, masked=False)
    assert (forward.flops, forward.launches) == (2 * pairs * 2 * (32 + 64), 3)
    assert forward.written == stats + partial + 4


def test_a_query_tile_holds_a_sequence_that_is_shorter() -> None:
    from sparsebert.kernels._attention_map import padded, tiles

    for seq in (1, 16, 17, 40, 512):
        for width in (8, 64, 100, 256):
            for wide in (False, True):
                tile = tiles(seq, width, 64, wide)
                assert 16 <= tile.other <= max(16, 2 * seq) and 16 <= tile.own <= max(16, 2 * seq)
    assert [padded(width) for width in (1, 16, 17, 64, 100, 256)] == [16, 16, 32, 64, 128, 256]
