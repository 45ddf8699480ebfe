"""Which format is chosen, from timings that the tests make up; and what is remembered of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nn.sparse_layers import mask_for
from torch import Tensor

from sparsebert.errors import UserError
from sparsebert.nn import Choice, choose, forget_choices, remember
from sparsebert.nn.choose import DENSE_PATHS, MARGIN, measure
from sparsebert.nn.structure import structure_of


class Clock:
    """A timer that says what it is told, and counts how often it is asked."""

    def __init__(self, *turns: Mapping[str, float]) -> None:
        self.turns, self.asked = turns, 0

    def __call__(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        for call in calls.values():
            call()
        times = self.turns[self.asked % len(self.turns)]
        self.asked += 1
        return {name: times.get(name, 1.0) for name in calls}


def weight_of(n: int = 64, k: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0)).to(dtype)


def blocky(n: int = 64, k: int = 64, shift: int = 0) -> Tensor:
    """A mask of 16x16 blocks, one kept in each row of them."""
    kept = torch.eye(n // 16, k // 16, dtype=torch.bool).roll(shift, 1)
    return kept.repeat_interleave(16, 0).repeat_interleave(16, 1)


def test_the_quickest_in_total_is_chosen() -> None:
    clock = Clock({"unstructured": 0.5, "blocks:16x16": 0.9}, {"unstructured": 0.9, "blocks:16x16": 0.1})
    found = choose(weight_of(), blocky(), rows=(4, 40), timer=clock)
    assert found.format == "blocks:16x16" and found.seconds["blocks:16x16"] == (0.9, 0.1) and found.rows == (4, 40)
    assert found.speedup == pytest.approx(2.0) and found.dense == (1.0, 1.0)
    assert found.reason == "blocks:16x16 is 2.00x as fast as the best dense path"


def test_a_format_that_is_slower_than_dense_once_is_not_chosen() -> None:
    clock = Clock({"blocks:16x16": 1.01}, {"blocks:16x16": 0.01, "unstructured": 0.9})
    found = choose(weight_of(), blocky(), rows=(4, 40), timer=clock)
    assert found.format == "dense" and found.speedup == 1.0 and found.fastest == "blocks:16x16"
    assert found.reason == (
        "no sparse format is 5% faster than dense at every number of rows; the best, blocks:16x16, runs at 0.99x at 4 "
        "rows, 100.00x at 40 rows"
    )


@pytest.mark.parametrize("path", DENSE_PATHS)
def test_it_must_beat_the_better_dense_path_by_more_than_noise(path: str) -> None:
    for share, expected in ((1 - MARGIN / 2, "dense"), (1 - 2 * MARGIN, "unstructured")):
        clock = Clock({path: 0.5, "unstructured": 0.5 * share})
        assert choose(weight_of(), rows=(4,), timer=clock, use_memory=False).format == expected


@given(st.lists(st.lists(st.floats(0.1, 10), min_size=5, max_size=5), min_size=1, max_size=3))
def test_what_is_chosen_is_never_slower_than_dense(times: list[list[float]]) -> None:
    names = [*DENSE_PATHS, "unstructured", "blocks:16x16", "compact"]
    mask = blocky()
    mask[:16] = False
    turns = [dict(zip(names, turn, strict=True)) for turn in times]
    rows = range(1, len(turns) + 1)
    found = choose(weight_of(), mask, rows=rows, timer=Clock(*turns), use_memory=False)
    if found.format != "dense":
        assert all(own < best for own, best in zip(found.seconds[found.format], found.dense, strict=True))
    faster = [n for n in names[2:] if all(turn[n] < 0.9 * min(turn[d] for d in DENSE_PATHS) for turn in turns)]
    assert not faster or found.format != "dense"


def candidates(mask: Tensor, dtype: torch.dtype = torch.float32, trainable: bool = False) -> set[str]:
    return set(structure_of(torch.ones(mask.shape), mask).candidates(dtype, trainable)[0])


def test_candidates_are_the_formats_that_fit_the_mask() -> None:
    random = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) > 0.5
    # Half of all weights at random: blocks of more than two weights are nearly all full.
    assert candidates(random) == {"unstructured"}
    assert candidates(blocky(), torch.bfloat16) == {
        *("unstructured", "blocks:4x2", "blocks:8x2", "blocks:16x2", "blocks:16x16", "blocks:32x32")
    }
    assert candidates(blocky()) == {"unstructured", "blocks:8x1", "blocks:16x1", "blocks:16x16", "blocks:32x32"}
    assert candidates(blocky(), trainable=True) == {"unstructured", "blocks:8x1", "blocks:16x1", "blocks:16x16"}
    assert candidates(mask_for("semi_structured:2:4", 64, 64)) == {"unstructured", "semi_structured:2:4"}
    one_of_four = torch.rand(64, 16, 4).argsort(2).view(64, 64) < 1
    assert {"unstructured", "semi_structured:1:4"} <= candidates(one_of_four)
    assert not any("2:8" in spelling for spelling in candidates(one_of_four))
    rows_gone = random.clone()
    rows_gone[3] = False
    assert candidates(rows_gone) == {"unstructured", "compact"} and candidates(rows_gone, trainable=True) == {
        "unstructured"
    }
    assert candidates(torch.ones(64, 64, dtype=torch.bool)) == {"unstructured"}
    assert {"unstructured", "compact"} <= candidates(torch.zeros(64, 64, dtype=torch.bool))
    assert candidates(torch.ones(3, 5, dtype=torch.bool)) == {"unstructured"}


def test_a_weight_that_is_zero_by_chance_leaves_a_pattern_what_it_is() -> None:
    mask = mask_for("semi_structured:2:4", 64, 64)
    mask[0] = False
    assert "semi_structured:2:4" in candidates(mask) and "semi_structured:2:4" not in candidates(mask, trainable=True)


def test_why_formats_were_not_timed_is_said() -> None:
    found = choose(weight_of(60, 64), torch.rand(60, 64) > 0.5, timer=Clock({}))
    assert found.left_out["blocks:8x1"] == "blocks of 8x1 do not divide [60, 64]"
    assert "blocks:16x16: left out, blocks of 16x16 do not divide [60, 64]" in str(found)
    found = choose(weight_of(), torch.rand(64, 64) > 0.5, timer=Clock({}))
    assert "its blocks would store" in found.left_out["blocks:16x16"]


def test_a_format_that_does_not_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsebert.formats import Blocks

    def fails(*_: object) -> Tensor:
        raise RuntimeError("no kernel\nand more")

    monkeypatch.setattr(Blocks, "linear", fails)
    found = choose(weight_of(), blocky(), timer=Clock({"unstructured": 0.5}))
    assert set(found.seconds) == {*DENSE_PATHS, "unstructured"} and found.format == "unstructured"
    assert found.left_out["blocks:16x16"] == "it does not run here: no kernel"


def test_the_table_has_every_number() -> None:
    found = choose(weight_of(), blocky(), rows=(4,), timer=Clock({"unstructured": 2e-6, "F.linear": 4e-6}))
    lines = str(found).splitlines()
    assert lines[0].split() == ["format", "4", "rows"]
    assert lines[1].split() == ["unstructured", "2.0", "us", "chosen"] and lines[2].split() == ["F.linear", "4.0", "us"]


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("outside", [torch.inference_mode, torch.enable_grad])
def test_the_layer_is_timed_and_in_training_its_backward(trainable: bool, outside: Callable[[], object]) -> None:
    weight, bias = weight_of().requires_grad_(), torch.randn(64, requires_grad=True)
    results: dict[str, object] = {}

    def timer(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        results.update({name: call() for name, call in calls.items()})
        return dict.fromkeys(calls, 1.0)

    with outside(), torch.autocast("cpu", torch.bfloat16):  # type: ignore[attr-defined]
        choose(weight, blocky(), bias=bias, rows=(40,), activation="gelu", trainable=trainable, timer=timer)
    assert weight.grad is None and bias.grad is None
    if trainable:
        assert set(results.values()) == {None}
    else:
        first = results["F.linear"]
        assert isinstance(first, Tensor) and first.dtype == torch.float32 and not first.requires_grad
        for out in results.values():
            torch.testing.assert_close(out, first, rtol=1e-4, atol=1e-4)


def test_choosing_leaves_the_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    choose(weight_of(), timer=Clock({}))
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_of_equal_structure_share_one_measurement(own_memory: Path) -> None:
    clock = Clock({"unstructured": 0.5})
    first = choose(weight_of(), blocky(), timer=clock)
    assert clock.asked == 2 and not first.remembered and own_memory.is_file()
    again = choose(-weight_of(), blocky(shift=2), timer=clock)
    assert clock.asked == 2 and again.remembered and again.seconds == first.seconds and again.format == first.format
    remember._memo.clear()
    assert choose(weight_of(), blocky(), timer=clock).remembered and clock.asked == 2
    assert not choose(weight_of(), blocky(), timer=clock, use_memory=False).remembered


def test_what_was_measured_badly_can_be_forgotten(own_memory: Path) -> None:
    clock = Clock({"unstructured": 0.5}, {"unstructured": 2.0})
    forget_choices()
    assert choose(weight_of(), rows=(4,), timer=clock).format == "unstructured"
    again = choose(weight_of(), rows=(4,), timer=clock)
    assert str(again).endswith("remembered from an earlier measurement; after forget_choices() it is made anew")
    forget_choices()
    assert not own_memory.exists()
    assert choose(weight_of(), rows=(4,), timer=clock).format == "dense" and clock.asked == 2
    remember._memo.clear()
    assert choose(weight_of(), rows=(4,), timer=clock).format == "dense" and clock.asked == 2


@pytest.mark.parametrize(
    "other",
    [
        {"weight": weight_of(64, 128)},
        {"weight": weight_of(dtype=torch.bfloat16)},
        {"mask": blocky() & (torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) > 0.5)},
        {"bias": torch.zeros(64)},
        {"activation": "gelu"},
        {"rows": (4, 40)},
        {"trainable": True},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_makes_a_difference_is_measured_anew(other: dict[str, object]) -> None:
    clock = Clock({})
    usual: dict[str, object] = {"weight": weight_of(), "mask": blocky(), "timer": clock}
    choose(**usual)  # type: ignore[arg-type]
    asked = clock.asked
    wanted = {**usual, **other}
    if wanted["weight"].shape != (64, 64):  # type: ignore[attr-defined]
        wanted["mask"] = blocky(64, 128)
    choose(**wanted)  # type: ignore[arg-type]
    assert clock.asked > asked


@pytest.mark.parametrize("name", ["SPARSEBERT_ISA", "SPARSEBERT_BACKEND"])
def test_other_kernels_are_measured_anew(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock({})
    monkeypatch.delenv(name, raising=False)
    choose(weight_of(), timer=clock)
    asked = clock.asked
    monkeypatch.setenv(name, {"SPARSEBERT_ISA": "generic", "SPARSEBERT_BACKEND": "reference"}[name])
    choose(weight_of(), timer=clock)
    assert clock.asked > asked


def test_another_number_of_threads_is_measured_anew() -> None:
    clock = Clock({})
    choose(weight_of(), timer=clock)
    asked = clock.asked
    torch.set_num_threads(2)
    choose(weight_of(), timer=clock)
    torch.set_num_threads(1)
    assert clock.asked > asked


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"version": 1}',
        '{"version": 99, "choices": {}}',
        '{"version": 1, "choices": []}',
        "\x00\xff",
        "[" * 100_000,
    ],
)
def test_a_broken_file_costs_a_measurement_and_no_more(text: str, own_memory: Path) -> None:
    own_memory.parent.mkdir()
    own_memory.write_text(text, encoding="utf-8")
    clock = Clock({"unstructured": 0.5})
    assert choose(weight_of(), timer=clock).format == "unstructured"
    remember._memo.clear()
    assert choose(weight_of(), timer=clock).remembered


@pytest.mark.parametrize(
    "change",
    [
        {"rows": []},
        {"rows": "many"},
        {"seconds": {}},
        {"seconds": {"F.linear": [1.0, 1.0], "dense_linear": [1.0, 1.0], "nonsense": [0.1, 0.1]}},
        {"seconds": {"F.linear": [1.0], "dense_linear": [1.0]}},
        {"seconds": {"F.linear": [-1.0, 1.0], "dense_linear": [1.0, 1.0]}},
        {"seconds": {"F.linear": [float("nan"), 1.0], "dense_linear": [1.0, 1.0]}},
        {"left_out": None},
    ],
)
def test_an_entry_that_is_none_is_measured_anew(change: dict[str, object], own_memory: Path) -> None:
    clock = Clock({"unstructured": 0.5})
    choose(weight_of(), timer=clock)
    found = json.loads(own_memory.read_text(encoding="utf-8"))
    for entry in found["choices"].values():
        entry.update(change)
    own_memory.write_text(json.dumps(found), encoding="utf-8")
    remember._memo.clear()
    again = choose(weight_of(), timer=clock)
    assert not again.remembered and again.format == "unstructured"


def test_a_folder_that_cannot_be_written_is_no_error(own_memory: Path) -> None:
    own_memory.parent.write_text("a file where the folder should be", encoding="utf-8")
    clock = Clock({})
    assert not choose(weight_of(), timer=clock).remembered
    # In this process it is remembered all the same.
    assert choose(weight_of(), timer=clock).remembered


WRITER = """
import pathlib, sys
from sparsebert.nn import remember
remember.path = lambda: pathlib.Path(sys.argv[1])
for number in range(int(sys.argv[2]), int(sys.argv[2]) + 50):
    remember.remember(f"key {number}", {"number": number})
"""


def test_processes_that_write_at_once_lose_nothing(own_memory: Path) -> None:
    commands = [[sys.executable, "-c", WRITER, str(own_memory), str(50 * index)] for index in range(2)]
    workers = [subprocess.Popen(command) for command in commands]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    found = json.loads(own_memory.read_text(encoding="utf-8"))["choices"]
    assert {entry["number"] for entry in found.values()} == set(range(100))
    assert [path.name for path in sorted(own_memory.parent.iterdir())] == ["choices.json", "choices.lock"]


def test_the_file_does_not_grow_without_end(own_memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remember, "MOST", 3)
    for number in range(5):
        remember.remember(f"key {number}", {})
    assert list(json.loads(own_memory.read_text(encoding="utf-8"))["choices"]) == ["key 2", "key 3", "key 4"]


def test_the_real_timer_times_every_call() -> None:
    counts = dict.fromkeys(("one", "two"), 0)

    def counted(name: str) -> Callable[[], None]:
        def call() -> None:
            counts[name] += 1

        return call

    seconds = measure({name: counted(name) for name in counts})
    assert set(seconds) == {"one", "two"} and all(second > 0 for second in seconds.values())
    assert min(counts.values()) >= 3


def test_by_the_real_timer_something_is_chosen() -> None:
    found = choose(weight_of(), blocky(), rows=(4,))
    assert isinstance(found, Choice) and found.format in {"dense", *found.seconds}
    assert {*DENSE_PATHS, "unstructured", "blocks:16x16"} <= set(found.seconds)


@pytest.mark.parametrize("rows", [(), (0,), (-1,), (1.5,), "16", 16, (True,)])
def test_rows_that_cannot_be_are_refused(rows: object) -> None:
    with pytest.raises(UserError, match="rows: expected numbers of rows of x"):
        choose(weight_of(), rows=rows)  # type: ignore[arg-type]
