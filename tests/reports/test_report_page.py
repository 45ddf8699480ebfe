"""The HTML report: what it says of runs, what it says is missing, and that nothing of a run becomes markup."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from reports.finished import finished
from reports.pages import Page, measure

from sparsebert.reports.html.page import page
from sparsebert.reports.html.plots import COLOURS
from sparsebert.reports.html.series import by_task
from sparsebert.reports.runs import RunRecord, read_run

EVIL = "<script>alert('x')</script>&\"\x00"


def run(folder: Path, score: float, seed: int = 1, method: str = "imp", target: float = 0.5, **more: Any) -> RunRecord:
    sparsity = {"target": target, "masked": target, "model": target / 2, "encoder": target}
    return finished(folder, method=method, score=score, seed=seed, sparsity=sparsity, **more)


def configured(record: RunRecord, **sections: dict[str, Any]) -> RunRecord:
    """The run again, with other settings."""
    config = {name: {**record.config[name], **sections.get(name, {})} for name in ("run", "settings", "trainer")}
    record.files.config.write_text(yaml.safe_dump(config), encoding="utf-8")
    return read_run(record.folder)


def row_of(shown: Page, *start: str) -> list[str]:
    found = [row for row in shown.rows if tuple(row[: len(start)]) == start]
    assert len(found) == 1, (start, found)
    return found[0]


def test_one_run_alone_makes_a_page_that_says_what_is_missing(tmp_path: Path) -> None:
    shown = Page(page([run(tmp_path / "only", 0.75)], "My <runs>", "python -m sparsebert.report only"))
    assert shown.headings[0] == "My <runs>" and len(shown.headings) == 9
    assert row_of(shown, "imp") == ["imp", "75.0", "1"]
    assert row_of(shown, "only")[:-1] == [
        *("only", "imp", "sst2", "unstructured"),
        *("50", "50", "25", "1", "75.00 accuracy", "3 s"),
    ]
    for words in (
        "One seed each on sst2: nothing is known of the spread there.",
        "python -m sparsebert.benchmark RUN",
        "only/model/masks.safetensors: missing",
        "No curve was logged (metrics.jsonl) by: sst2: imp, 50 %.",
        "Not measured (no benchmark.json): only.",
        "python -m sparsebert.analyze RUN",
        "python -m sparsebert.report only",
    ):
        assert words in shown.words, words


def test_seeds_become_a_mean_with_its_spread_and_dense_runs_a_level(tmp_path: Path) -> None:
    runs = [run(tmp_path / f"s{seed}", score, seed) for seed, score in ((2, 0.8), (1, 0.7), (3, 0.9))]
    runs += [run(tmp_path / f"hi{seed}", 0.6, seed, target=0.9) for seed in (1, 2)]
    runs += [run(tmp_path / "dense", 0.91, method="finetune", target=0.0, pattern=None)]
    shown = Page(page(runs))
    assert ["method", "dense", "50 %", "90 %", "seeds"] in shown.rows
    assert row_of(shown, "imp") == ["imp", "", "80.0 ± 10.0", "60.0 ± 0.0 (2 of 3 seeds)", "1, 2, 3"]
    assert row_of(shown, "finetune, dense") == ["finetune, dense", "91.0", "", "", "1"]
    assert "imp, 50 %: 80.0 ± 10.0 (70.0, 80.0, 90.0)" in shown.tooltips
    assert "finetune, dense" in shown.tooltips
    assert "sst2: accuracy, points by sparsity of the masked weights" in shown.pictures


def test_only_the_seed_may_differ_within_a_mean(tmp_path: Path) -> None:
    slow = {"learning_rate": 1e-5, "logging_steps": 7, "seed": 2}
    runs = [
        run(tmp_path / "a", 0.8),
        configured(run(tmp_path / "b", 0.6, 2), trainer=slow),
        configured(run(tmp_path / "c", 0.7, 3), trainer={"logging_steps": 9, "seed": 3}),
        run(tmp_path / "again", 0.1),
        run(tmp_path / "other", 0.5, data={"rows": {"train": 100, "validation": 21}}),
    ]
    shown = Page(page(runs))
    assert row_of(shown, "imp, learning_rate -")[1:] == ["75.0 ± 7.1", "1, 3"]
    assert row_of(shown, "imp, learning_rate 1e-05")[1:] == ["60.0", "2"]
    assert "1 run repeats another's configuration and seed" in shown.words
    # Scored on other examples, it is a task of its own.
    names = {f"sst2 ({number}): accuracy in points, by sparsity" for number in (1, 2)}
    assert names <= set(shown.captions)


def test_a_given_mask_counts_by_where_it_comes_from(tmp_path: Path) -> None:
    runs = []
    for seed in (1, 2):
        for origin, score in (("search", 0.8), ("other", 0.4)):
            record = run(tmp_path / f"{origin}{seed}", score, seed, method="given_mask")
            runs.append(configured(record, settings={"mask": f"/far/away/{origin}-sst2-0.5-s{seed}"}))
    text = page(runs)
    shown = Page(text)
    assert row_of(shown, "given_mask, mask search")[1:] == ["80.0 ± 0.0", "1, 2"]
    assert row_of(shown, "given_mask, mask other")[1:] == ["40.0 ± 0.0", "1, 2"]
    assert "/far/away" not in text, "where a folder lies on this machine is nobody else's business"


def test_latencies_are_plotted_and_slower_rows_are_marked(tmp_path: Path) -> None:
    fast, slow, feigned = (run(tmp_path / name, 0.7, method=name) for name in ("fast", "slow", "feigned"))
    measure(fast.folder, 2.0, 4.0, score=0.65)
    measure(slow.folder, 8.0, 4.0)
    measure(feigned.folder, 1.0, 4.0, imposed=True)
    shown = Page(page([fast, slow, feigned]))
    assert "fast, 50 %: 65.0 at 2 ms (1 measured)" in shown.tooltips, "the variant's own score, where there is one"
    assert "slow, 50 %: 70.0 at 8 ms (1 measured)" in shown.tooltips
    assert not any("feigned, 50 %" in tip and "ms" in tip for tip in shown.tooltips), "its masks were imposed"
    assert "sst2, batch 1 x 8, full lengths: accuracy, points by latency, ms (p50)" in shown.pictures
    assert [row[-1] for row in shown.losing] == ["0.50x slower"]
    for words in ("A fine CPU, 1 thread", "said plainly", "no <such> thing", "compact left out", "2030-01-02"):
        assert words in shown.words, words


def test_a_damaged_measurement_costs_its_own_place_alone(tmp_path: Path) -> None:
    runs = [run(tmp_path / name, 0.7, method=name) for name in ("one", "two", "three", "fine")]
    (runs[0].folder / "benchmark.json").write_text("{", encoding="utf-8")
    (runs[1].folder / "benchmark.json").write_text('{"schema": 1, "subject": []}', encoding="utf-8")
    (runs[2].folder / "analysis.json").write_text("[", encoding="utf-8")
    measure(runs[3].folder, 2.0, 4.0)
    shown = Page(page(runs))
    assert "benchmark.json: damaged" in shown.words and "two: its benchmark.json is none of this" in shown.words
    assert "analysis.json: damaged" in shown.words and row_of(shown, "blocks:8x2 fp32")[-1] == "2.00x"


def test_analyses_are_shown_with_what_was_left_out(tmp_path: Path) -> None:
    record = run(tmp_path / "one", 0.7)
    table = {"title": "how alike", "heads": ["pair", "share"], "rows": [["a, b", "0.5"]], "notes": ["by chance 0.3"]}
    report = {
        "schema": 1,
        "analyses": {
            "similarity": {"tables": [table], "data": {"x": 1}, "date": "2030-01-02", "command": "analyse it"}
        },
        "left_out": {"shuffle": "it trains"},
    }
    (record.folder / "analysis.json").write_text(json.dumps(report), encoding="utf-8")
    shown = Page(page([record], others=[("many runs", {"sort": {"of": [{"deep": 0.25}]}})]))
    assert row_of(shown, "a, b") == ["a, b", "0.5"] and row_of(shown, "sort · of · 0 · deep")[1] == "0.25"
    for words in ("how alike", "by chance 0.3", "analyse it", "shuffle left out: it trains", "many runs"):
        assert words in shown.words, words


def test_curves_of_the_log_over_phases_and_seeds(tmp_path: Path) -> None:
    log = [
        {"phase": "search", "step": 1, "loss": 2.0, "sparsity": 0.1, "learning_rate": 1e-5},
        {"phase": "search", "step": 2, "loss": None, "sparsity": 0.5},
        {"phase": "search", "step": 2, "train_loss": 2.0, "train_seconds": 1.0},
        {"phase": "tune", "step": 1, "loss": 1.0, "hidden_loss": 0.5},
        {"phase": "tune", "step": 2, "loss": 0.5, "hidden_loss": 0.2},
        {"phase": "tune", "step": 2, "eval_loss": 0.7, "eval_accuracy": 0.6, "eval_runtime": 3.0},
        {"phase": "tune", "step": 2, "eval_train_accuracy": 0.9},
    ]
    runs = [run(tmp_path / "one", 0.7, 1, log=log), run(tmp_path / "two", 0.7, 2, log=log)]
    shown = Page(page(runs))
    assert {"loss while training: loss by step", "schedules: share by step"} <= set(shown.pictures)
    assert {"train and dev: loss: loss by step", "train and dev: accuracy: accuracy by step"} <= set(shown.pictures)
    assert not any("runtime" in label for label in shown.pictures)
    for words in ("hidden loss", "sparsity", "on a slice of train", "search", "tune"):
        assert words in shown.words.splitlines(), words


def test_nothing_of_a_run_becomes_markup(tmp_path: Path) -> None:
    record = run(
        tmp_path / "<b>", 0.7, method=EVIL, task=EVIL, metric=EVIL, pattern=EVIL, note=EVIL, precision=EVIL,
        hardware={EVIL: EVIL}, versions={EVIL: EVIL}, model={"source": EVIL, "sha256": EVIL},
        log=[{"phase": EVIL, "step": 1, "loss": 1.0}, {"phase": "other", "step": 2, f"{EVIL}_loss": 1.0}],
    )  # fmt: skip
    record = configured(record, run={"model": EVIL, "text": [EVIL]}, settings={EVIL: EVIL})
    measure(record.folder, 8.0, 4.0)
    text = (record.folder / "benchmark.json").read_text(encoding="utf-8")
    (record.folder / "benchmark.json").write_text(text.replace("blocks:8x2", "<script>x</script>"), encoding="utf-8")
    (record.folder / "analysis.json").write_text(json.dumps({"analyses": {EVIL: {EVIL: EVIL}}}), encoding="utf-8")
    whole = page([record], EVIL, EVIL, [(EVIL, {EVIL: [EVIL]})])
    shown = Page(whole)  # fails on a script
    assert "<script" not in whole and "\x00" not in whole and "<script>alert('x')</script>" in shown.words


def test_folders_of_this_machine_stay_its_own_business(tmp_path: Path) -> None:
    place = "/somewhere/of/mine"
    record = configured(run(tmp_path / "one", 0.7), run={"model": f"{place}/bert", "data_dir": f"{place}/data"})
    text = page([record])
    assert "/home/me" not in text and str(tmp_path) not in text
    assert "model: bert" in text and "--data-dir FOLDER" in text


def test_colours_differ_within_a_task_and_stay_with_a_method_across_tasks(tmp_path: Path) -> None:
    names = [f"method{number}" for number in range(COLOURS)]
    first = [run(tmp_path / "first" / name, 0.7, method=name) for name in names]
    second = [run(tmp_path / "second" / name, 0.7, method=name, task="rte") for name in names[::-1]]
    other = [run(tmp_path / "other" / name, 0.7, method=f"{name}b", task="mrpc") for name in names[:3]]
    mixed = [run(tmp_path / "mixed" / name, 0.7, method=name, task="cola") for name in ("method0", "method0b", "new")]
    tasks = by_task([*first, *second, *other, *mixed])
    for task in tasks:
        colours = [series.style % COLOURS for series in task.series]
        assert len(set(colours)) == len(colours), task.name
    styles = [{series.label: series.style for series in task.series} for task in tasks[:2]]
    assert styles[0] == styles[1]
