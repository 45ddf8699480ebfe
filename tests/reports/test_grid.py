"""A table of runs: what its file may say, which runs it means, and how its scores are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsebert.errors import UserError
from sparsebert.reports.accuracy_table import markdown, records
from sparsebert.reports.grid import Cell, Table, cells_of, configuration, load_table

TABLE: dict[str, Any] = {
    "title": "A table",
    "source": "A paper",
    "seeds": [42, 43],
    "sparsities": [0.5, 0.9],
    "tasks": {"rte": {}, "sst2": {"run": {"few_samples": 5000}}},
    "variants": {"clean": {}, "30 % noise": {"run": {"label_noise": 0.3}}},
    "entries": {
        "dense": {"config": "finetune/{task}", "sparsities": []},
        "found": {"config": "tamt/{task}", "after": "search", "set": {"settings": {"objective": "kd"}}},
        "search": {"config": "tamt/{task}", "tasks": ["rte"], "variants": ["clean"], "hidden": True},
    },
    "published": [{"entry": "found", "sparsity": 0.5, "task": "mean", "score": 70.1}],
}


def write(folder: Path, **changes: Any) -> str:
    (folder / "configs" / "tables").mkdir(parents=True, exist_ok=True)
    for method in ("finetune", "tamt"):
        for task in ("rte", "sst2"):
            path = folder / "configs" / method / f"{task}.yaml"
            path.parent.mkdir(exist_ok=True)
            run = {"method": method, "task": task, **({"text": []} if method == "tamt" else {})}
            path.write_text(yaml.safe_dump({"run": run, "trainer": {"learning_rate": 1e-4}}), encoding="utf-8")
    path = folder / "configs" / "tables" / "mine.yaml"
    path.write_text(yaml.safe_dump({**TABLE, **changes}, sort_keys=False), encoding="utf-8")
    return str(path)


def result(score: float) -> dict[str, Any]:
    return {
        "metric": "accuracy",
        "score": score,
        "precision": "fp32",
        "model": {"source": "here/bert-tiny"},
        "hardware": {"cpu": "a CPU"},
        "versions": {"torch": "2", "transformers": "5"},
        "sparsity": {"masked": 0.5},
        "data": {},
    }


def names(cells: list[Cell]) -> list[str]:
    return [cell.name for cell in cells]


def test_the_runs_are_the_product_and_nothing_comes_before_what_it_needs(tmp_path: Path) -> None:
    cells = cells_of(load_table(write(tmp_path)), [42])
    # dense: 2 tasks x 2 variants; search: 2 sparsities; found: 2 x 2 x 2.
    assert len(cells) == len(set(names(cells))) == 4 + 2 + 8
    for index, cell in enumerate(cells):
        if cell.entry.name == "found":
            assert cell.needs is not None and cell.needs in cells[:index]
            assert (cell.needs.entry.name, cell.needs.sparsity, cell.needs.seed) == ("search", cell.sparsity, 42)


def test_what_is_nearer_to_the_run_wins(tmp_path: Path) -> None:
    table = load_table(write(tmp_path, quick={"set": {"trainer": {"max_steps": 2}}}))
    cells = {cell.name: cell for cell in cells_of(table, [43])}
    cell = cells["found-sst2-0.9-30__noise-s43"]
    config = configuration(table, cell, tmp_path / "out", {"data_dir": "data", "text": ["t"]}, quick=False)
    assert config["run"] == {
        "method": "tamt", "task": "sst2", "few_samples": 5000, "label_noise": 0.3, "data_dir": "data", "sparsity": 0.9
    }  # fmt: skip
    assert config["settings"] == {"objective": "kd", "mask": str(tmp_path / "out" / "search-rte-0.9-clean-s43")}
    assert config["trainer"] == {"learning_rate": 1e-4, "seed": 43}
    search = configuration(table, cells["search-rte-0.9-clean-s43"], tmp_path, {"text": ["t"]}, quick=True)
    assert search["run"]["text"] == ["t"] and search["trainer"]["max_steps"] == 2
    dense = configuration(table, cells["dense-rte-clean-s43"], tmp_path, {"text": ["t"]}, quick=False)
    assert "text" not in dense["run"] and "sparsity" not in dense["run"]


def test_means_and_spreads_are_over_seeds(tmp_path: Path) -> None:
    table = load_table(write(tmp_path))
    results = {}
    for cell in cells_of(table, [42, 43]):
        base = {"rte": 0.5, "sst2": 0.7}[cell.task] + (0.1 if cell.entry.name == "dense" else 0.0)
        results[cell] = result(base + (0.02 if cell.seed == 43 else 0.0))
    text = markdown(table, results, "the command")
    assert "| found | 50% | clean | 51.0 ± 1.4 | 71.0 ± 1.4 | 61.0 ± 1.4 |" in text
    assert "| dense | dense | 30 % noise | 61.0 ± 1.4 | 81.0 ± 1.4 | 71.0 ± 1.4 |" in text
    assert "search" not in text
    assert "| found | 50% | 70.1 |" in text
    assert "`the command`" in text and "seeds 42, 43" in text and "bert-tiny" in text
    first = next(iter(results.values()))
    first["phases"] = [{"mask": {"run": "/some/where/search-rte"}}]
    assert len(records(results)) == len(results)
    assert records(results)[0]["phases"] == [{"mask": {"run": "search-rte"}}]


def test_what_was_watched_is_shown_beside_its_gap(tmp_path: Path) -> None:
    from sparsebert.reports.grid import _result

    table = load_table(write(tmp_path, sparsities=[0.9], variants={"": {}}))
    cells = [cell for cell in cells_of(table, [42, 43]) if cell.entry.name == "found"]
    results = {}
    for cell in cells:
        train = 0.9 if cell.seed == 42 else 0.94
        folder = tmp_path / cell.name
        folder.mkdir()
        rows = [{"phase": "a", "step": 5, "loss": 1.0}, {"phase": "a", "step": 9, "eval_accuracy": 0.6},
                {"phase": "a", "step": 9, "eval_train_accuracy": 0.7}, {"phase": "b", "step": 9, "eval_accuracy": 0.65},
                {"phase": "b", "step": 9, "eval_train_accuracy": train}]  # fmt: skip
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        (folder / "result.json").write_text(json.dumps({**result(0.6), "train_score": train}), encoding="utf-8")
        results[cell] = _result(tmp_path, cell)
    text = markdown(table, results, "it")
    assert "| found, 90% | 27.0 ± 2.8 | 27.0 ± 2.8 | 27.0 ± 2.8 |" in text
    assert "| sst2: train / held out | 1 | 2 |" in text and "| found, 90% | 70 / 60 | 92 / 65 |" in text
    assert records(results)[0]["curve"] == [{"held_out": 0.6, "train": 0.7}, {"held_out": 0.65, "train": 0.9}]


def test_a_row_that_is_not_whole_has_no_mean(tmp_path: Path) -> None:
    table = load_table(write(tmp_path))
    results = {cell: result(0.5) for cell in cells_of(table, [42]) if cell.task == "rte"}
    assert "| found | 90% | clean | 50.0 |  |  |" in markdown(table, results, "it")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"seed": [1]}, "seed"),
        ({"entries": {"a": {"config": "x", "afer": "b"}}}, "afer"),
        ({"entries": {"a": {"label": "x"}}}, "names no config"),
        ({"entries": {"a": {"config": "x", "after": "b"}}}, "'b'"),
        ({"entries": {"a": {"config": "x", "tasks": ["cola"]}}}, "cola"),
    ],
)
def test_a_table_that_does_not_fit_together_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], word: str
) -> None:
    with pytest.raises(UserError, match=word):
        load_table(write(tmp_path, **changes))


def test_a_table_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_table(str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="'none'"):
        load_table("none")
    (tmp_path / "odd.yaml").write_text("title: [", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read"):
        load_table(str(tmp_path / "odd.yaml"))


def test_a_configuration_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    table: Table = load_table(write(tmp_path, entries={"a": {"config": "none/{task}"}}))
    with pytest.raises(UserError, match=r"none/rte\.yaml"):
        configuration(table, cells_of(table, [42])[0], tmp_path, {}, quick=False)
