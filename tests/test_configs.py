"""The configurations that the repository ships: every one resolves, every small one trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from sparsebert.methods import METHODS
from sparsebert.reports.grid import cells_of, configuration, load_table
from sparsebert.training.arguments import parse_arguments

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "tables")
TABLES = sorted((CONFIGS / "tables").glob("*.yaml"))
SMALL = ("minilm", "tiny")


def method_of(path: Path) -> str:
    return path.parent.name


def size_of(path: Path) -> str:
    return path.stem.rpartition("-")[2]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_configuration_resolves(path: Path) -> None:
    config, output, resume = parse_arguments(["--config", str(path)])
    config.check()
    assert config.run.method == method_of(path)
    assert config.run.task == path.stem.partition("-")[0]
    assert (output, resume) == (None, False)


def test_every_method_has_a_configuration_of_each_size() -> None:
    for name in METHODS:
        sizes = {size_of(path) if "-" in path.stem else "paper" for path in FILES if method_of(path) == name}
        assert sizes == {"paper", *SMALL}, name


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_run_of_every_table_resolves(path: Path, tmp_path: Path) -> None:
    table = load_table(str(path))
    for cell in cells_of(table, table.seeds[:1]):
        for quick in (False, True):
            file = tmp_path / "cell.yaml"
            file.write_text(yaml.safe_dump(configuration(table, cell, tmp_path, {}, quick)), encoding="utf-8")
            config = parse_arguments(["--config", str(file)])[0]
            config.check()
            assert config.run.task == cell.task
            assert cell.sparsity is None or config.run.sparsity == cell.sparsity


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tiny.Workshop:
    return tiny.Workshop(tmp_path_factory.mktemp("shop"))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("size", SMALL)
def test_the_small_ones_train(shop: tiny.Workshop, name: str, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each method and size, for a step or two, on a tiny model and task in place of its own."""
    monkeypatch.setenv("SPARSEBERT_CACHE", str(shop.folder / "cache"))
    path = next(path for path in FILES if method_of(path) == name and size_of(path) == size)
    about: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    words = ["--config", str(path), "--max-length", "16", "--teacher-max-steps", "1"]
    if name == "tamt":
        text = shop.folder / "text.txt"
        text.write_text("the film was very good and the plot was bad\n" * 60, encoding="utf-8")
        words += ["--text", str(text), "--text-length", "16", "--search-steps", "2", "--train-mlm-head", "2"]
    outcome = shop.run(name, *words, steps=2)
    assert outcome.result["method"] == name
    if METHODS[name].sparsifies:
        assert outcome.result["sparsity"]["masked"] == pytest.approx(about["run"].get("sparsity", 0.5), abs=0.01)
