"""The GPU kernels' bounds on paper: what binds, and that every kernel's own count is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import paper
from sparsebert.kernels._cost import Cost


def case(**changes: object) -> paper.Case:
    # 3 TB/s and 800 TFLOP/s: a microsecond of memory and two of products, beside four of products.
    given = {"ours": Cost(3_000_000, 0, 1_600_000_000), "dense": Cost(0, 0, 3_200_000_000), **changes}
    return paper.Case("G0", "a kernel", target=1.5, **given)  # type: ignore[arg-type]


def test_what_binds_longest_is_the_bound() -> None:
    assert case().bounds() == pytest.approx((2.0, 2.0))
    # 22 MB of 5.5 TB/s are 4 microseconds, of 8 TB/s 2.75.
    assert case(staged=22_000_000).bounds() == pytest.approx((1.0, 4 / 2.75))
    assert case(ours=Cost(12_000_000, 0, 0)).bounds() == pytest.approx((1.0, 1.0))
    # Warm, memory is the cache.
    assert case(ours=Cost(22_000_000, 0, 0), warm=True).bounds() == pytest.approx((1.0, 4 / 2.75))
    # Units that nobody drives fully bind both; then memory does not.
    assert case(ours=Cost(9_000_000, 0, 1_600_000_000), share=0.5).bounds() == pytest.approx((2.0, 2.0))


def test_the_table_says_what_is_within_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = paper.table([case(), case(staged=22_000_000), case(staged=16_000_000), case(staged=40_000_000)])
    assert [line.rsplit("|", 2)[1].strip() for line in lines[2:]] == ["yes", "no", "if the cache is fast", "no"]
    monkeypatch.setattr(paper, "RESULTS", tmp_path)
    assert paper.main(["--record"]) == 0
    text = (tmp_path / "paper.md").read_text(encoding="utf-8")
    for goal in ("G5", "G6", "G7", "G8", "G9", "G11", "G13", "G15", "G17", "G18", "G21", "G22", "G23"):
        assert f"| {goal} |" in text
