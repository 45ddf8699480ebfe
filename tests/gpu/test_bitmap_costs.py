"""Costs of the bitmap ops, against counts by hand."""

from __future__ import annotations

from dataclasses import astuple

import pytest

from sparsebert import _load
from sparsebert.kernels import _bitmap_costs as costs
from sparsebert.kernels._cost import CEILINGS


def test_a_layer_of_bert_by_hand() -> None:
    # 3072x768, 471,860 kept: 943,720 bytes of values, 294,912 of bits, 2304 tiles of 8 bytes and one more.
    stored = 943_720 + 294_912 + 8 * 2305
    assert costs.stored_bytes(3072, 768, 471_860) == stored
    cost = costs.bitmap_linear(3072, 768, 471_860, 16)
    assert cost.read == stored + 2 * 16 * 768 + 2 * 3072 and cost.written == 2 * 16 * 3072
    assert cost.flops == 2 * 16 * 3072 * 768 and cost.launches == 1
    # A row is computed as eight.
    assert costs.bitmap_linear(3072, 768, 471_860, 1).flops == 2 * 8 * 3072 * 768


def test_few_rows_of_tiles_split_k() -> None:
    own = costs.plan(768, 3072, 16)
    assert (own.row_tiles, own.col_tiles, own.splits, own.blocks) == (48, 48, 2, 96)
    assert costs.plan(768, 768, 16).splits == 1
    cost = costs.bitmap_linear(768, 3072, 0, 16, bias=False)
    partial = 4 * 2 * 16 * 768
    assert cost.written == partial + 2 * 16 * 768 and cost.launches == 2
    assert cost.read == costs.stored_bytes(768, 3072, 0) + 2 * 16 * 3072 + partial


def test_the_plan_is_the_kernels_own() -> None:
    host = _load.host()
    if host is None or not hasattr(host, "bitmap_plan"):
        pytest.skip("the host module was not built")
    for n, k in ((1, 1), (768, 768), (768, 3072), (3072, 768), (4224, 64), (9000, 1024), (16, 5000)):
        for rows in (1, 9, 17, 64, 65, 256):
            for processors in (1, 108, 132):
                assert list(astuple(costs.plan(n, k, rows, processors))) == host.bitmap_plan(n, k, rows, processors)


def test_plans_at_the_edges() -> None:
    assert [costs.plan(16, 64, rows).groups for rows in (1, 8, 9, 16, 17, 32, 33, 64, 65, 256)] == [
        1, 1, 2, 2, 4, 4, 8, 8, 8, 8
    ]  # fmt: skip
    assert costs.plan(16, 64, 256).token_tiles == 4 and costs.plan(16, 64, 65).token_tiles == 2
    assert [costs.plan(16 * tiles, 64, 1).per_block for tiles in (263, 264, 527, 528)] == [1, 2, 2, 4]


def test_many_rows_decode_once_and_are_bound_by_arithmetic() -> None:
    cost = costs.bitmap_linear(3072, 768, 471_860, 4096)
    assert cost.launches == 2 and cost.flops == 2 * 4096 * 3072 * 768
    assert cost.seconds(CEILINGS["H100"]) == cost.flops / CEILINGS["H100"].flops_per_second
    few = costs.bitmap_linear(3072, 768, 471_860, costs.FEW_ROWS)
    assert few.launches == 1


def test_gather_reads_what_decode_writes() -> None:
    decode, gather = costs.bitmap_decode(40, 130, 1000), costs.bitmap_gather(40, 130, 1000)
    assert decode.written == 2 * 40 * 130 and gather.written == 2000
    assert decode.moved == gather.moved
