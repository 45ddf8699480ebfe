"""What the CUDA ops move, against counts by hand."""

from __future__ import annotations

import pytest

from sparsebert import _load
from sparsebert.kernels import _cuda_costs as costs
from sparsebert.kernels._cost import CEILINGS, Cost


def test_one_matrix_is_read_once() -> None:
    entries = 3072 * 768
    cost = costs.select_mask(entries)
    # Scores 4, weights 4, products 2 bytes, and a bit.
    assert cost == Cost(8 * entries, 2 * entries + entries // 8, 0, 1)
    assert cost.moved == pytest.approx(10.125 * entries)
    assert cost.seconds(CEILINGS["H100"]) == pytest.approx(8e-6, rel=0.01)


def test_a_whole_model_is_read_for_two_rounds_and_the_bits() -> None:
    entries = 110_000_000
    assert costs.score_passes(entries) == 3
    assert costs.select_mask(entries, tensors=74).moved == entries * (3 * 4 + 4 + 2) + entries // 8
    assert costs.select_mask(entries, tensors=74).launches == 4
    # Scores that nearly all share their upper bits are read in each round.
    assert costs.score_passes(entries, same_digit=0.9) == 4
    # Fewer than shared memory holds, on a device without a large cache.
    assert costs.score_passes(5_000_000, cache=0) == 2


def test_bits_alone_blocks_and_thresholds() -> None:
    assert costs.select_mask(1001, weight_bytes=0) == Cost(4004, 126, 0, 1)
    assert costs.threshold_mask(100, weights_per_score=16, weight_bytes=2) == Cost(400 + 3200, 13 + 3200, 0, 1)
    assert costs.nm_mask(64) == Cost(256, 8, 0, 2)


def test_split_weight_grad() -> None:
    entries = 768 * 768
    both = costs.split_weight_grad(768, 768, (768, 768))
    assert both == Cost(2 * entries + entries // 8 + 4 * entries, 4 * entries + 4 * entries, 2 * entries, 1)
    # Blocks of 32 x 32 lie in one tile each.
    assert costs.split_weight_grad(768, 768, (24, 24), need_weight=False) == Cost(6 * entries, 4 * 576, 2 * entries, 1)
    # Heads of 64 rows: two segments of 32 rows, and three tiles of columns; their sums are written and read.
    heads = costs.split_weight_grad(768, 768, (12, 1), need_weight=False)
    assert heads == Cost(6 * entries + 4 * 12 * 2 * 3, 4 * 12 + 4 * 12 * 2 * 3, 2 * entries, 2)
    assert costs.split_weight_grad(768, 768, (12, 1), need_scores=False).launches == 1


def test_the_numbers_are_the_kernels_own() -> None:
    host = _load.host()
    if host is None or not hasattr(host, "cuda_layout"):
        pytest.skip("the host module was not built")
    layout = host.cuda_layout
    assert layout["select_shared"] == costs.SELECT_SHARED
    assert (layout["split_segment"], layout["split_cols"]) == (costs.SEGMENT, costs.TILE_COLS)
