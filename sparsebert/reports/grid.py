"""A table of runs: method x sparsity x task x variant x seed, described in a YAML file, run cell by cell."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sparsebert.errors import UserError, unknown
from sparsebert.training.folder import write_text

__all__ = ["Cell", "Entry", "Table", "cells_of", "configs_folder", "load_table", "run_cells"]

_SECTIONS = ("run", "settings", "trainer")
_KEYS = {"title", "source", "seeds", "tasks", "sparsities", "variants", "entries", "quick", "published", "note"}
_QUICK = {"set": {"run": {"max_eval_samples": 200, "teacher_max_steps": 10}, "trainer": {"max_steps": 10}}}
_ENTRY_KEYS = {"label", "config", "after", "tasks", "sparsities", "variants", "set", "hidden"}


@dataclass(frozen=True, eq=False)
class Entry:
    """A row of the table: a method in one configuration."""

    name: str
    label: str
    config: str
    """File of the run's configuration under `configs/`, without its ending; `{task}` stands for the task."""
    after: str | None = None
    """The entry whose run of the same sparsity and seed gives this one its masks (`settings.mask`)."""
    tasks: tuple[str, ...] = ()
    sparsities: tuple[float | None, ...] = ()
    variants: tuple[str, ...] = ()
    set: Mapping[str, Any] = field(default_factory=dict)
    """Values that win over the configuration's, by section."""
    hidden: bool = False
    """Whether it is only there for others, and not shown."""


@dataclass(frozen=True)
class Table:
    """A paper's table, or one like it."""

    name: str
    title: str
    source: str
    note: str
    folder: Path
    """The `configs` folder."""
    seeds: tuple[int, ...]
    tasks: Mapping[str, Mapping[str, Any]]
    variants: Mapping[str, Mapping[str, Any]]
    entries: Mapping[str, Entry]
    quick: Mapping[str, Any]
    published: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Cell:
    """One run of a table."""

    entry: Entry
    task: str
    sparsity: float | None
    variant: str
    seed: int
    needs: Cell | None = None

    @property
    def name(self) -> str:
        """Of its folder."""
        words = [self.entry.name, self.task]
        if self.sparsity is not None:
            words.append(f"{self.sparsity:g}")
        if self.variant:
            words.append(self.variant.replace(" ", "_").replace("%", ""))
        return "-".join([*words, f"s{self.seed}"])


def configs_folder() -> Path:
    """The repository's folder `configs`; a `UserError` where the package is installed without it."""
    folder = Path(__file__).resolve().parents[2] / "configs"
    if not folder.is_dir():
        raise UserError(
            f"no folder {folder}: tables and configurations lie in the repository; give the path of a table in a clone"
        )
    return folder


def load_table(name: str) -> Table:
    """The table `configs/tables/NAME.yaml`, or the one in the file that `name` is the path of.

    Raises:
        UserError: no such table, or one whose parts do not fit together, naming the part.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"table {name}: there is no such file")
    else:
        known = {file.stem: file for file in sorted((configs_folder() / "tables").glob("*.yaml"))}
        if name not in known:
            raise unknown("table", name, known)
        path = known[name]
    try:
        about = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"table {path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(about, dict) or not {"title", "tasks", "entries", "seeds"} <= set(about):
        raise UserError(f"table {path}: expected at least title, seeds, tasks and entries")
    for key in about:
        if key not in _KEYS:
            raise unknown(f"part of table {path}", str(key), _KEYS)
    sparsities = tuple(about.get("sparsities") or (None,))
    tasks, variants = dict(about["tasks"]), dict(about.get("variants") or {"": {}})
    entries = {
        key: _entry(path, key, value, tuple(tasks), sparsities, tuple(variants))
        for key, value in about["entries"].items()
    }
    for entry in entries.values():
        if entry.after is not None and entry.after not in entries:
            raise unknown(f"entry after which {entry.name} comes", entry.after, entries)
    return Table(
        name=path.stem,
        title=str(about["title"]),
        source=str(about.get("source", "")),
        note=str(about.get("note", "")),
        folder=path.resolve().parents[1],
        seeds=tuple(about["seeds"]),
        tasks={key: value or {} for key, value in tasks.items()},
        variants={key: value or {} for key, value in variants.items()},
        entries=entries,
        quick=about.get("quick") or _QUICK,
        published=about.get("published") or (),
    )


def _entry(
    path: Path,
    name: str,
    about: Mapping[str, Any],
    tasks: tuple[str, ...],
    sparsities: tuple[float | None, ...],
    variants: tuple[str, ...],
) -> Entry:
    for key in about:
        if key not in _ENTRY_KEYS:
            raise unknown(f"part of entry {name} in {path}", str(key), _ENTRY_KEYS)
    if "config" not in about:
        raise UserError(f"table {path}: entry {name} names no config")
    for task in about.get("tasks", ()):
        if task not in tasks:
            raise unknown(f"task of entry {name} in {path}", str(task), tasks)
    return Entry(
        name=name,
        label=str(about.get("label", name)),
        config=str(about["config"]),
        after=about.get("after"),
        tasks=tuple(about.get("tasks") or tasks),
        sparsities=tuple(about["sparsities"] or (None,)) if "sparsities" in about else sparsities,
        variants=tuple(about.get("variants") or variants),
        set=about.get("set") or {},
        hidden=bool(about.get("hidden", False)),
    )


def cells_of(table: Table, seeds: Sequence[int]) -> list[Cell]:
    """The table's runs, seed by seed, in an order in which nothing comes before what it needs."""
    cells: list[Cell] = []
    for seed in seeds:
        found: dict[tuple[str, float | None], Cell] = {}
        for entry in sorted(table.entries.values(), key=lambda entry: entry.after is not None):
            for variant in entry.variants:
                for sparsity in entry.sparsities:
                    for task in entry.tasks:
                        needs = found.get((entry.after, sparsity)) if entry.after else None
                        if entry.after and needs is None:
                            raise UserError(f"table {table.name}: {entry.after} has no run at sparsity {sparsity}")
                        cell = Cell(entry, task, sparsity, variant, seed, needs)
                        found.setdefault((entry.name, sparsity), cell)
                        cells.append(cell)
    return cells


def configuration(table: Table, cell: Cell, output: Path, given: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    """A cell's configuration as `--config` takes it: the file's, then the task's, variant's and entry's values.

    Args:
        given: values of section `run` that the command line gives.

    Raises:
        UserError: a configuration that is not there or cannot be read.
    """
    path = table.folder / f"{cell.entry.config.format(task=cell.task)}.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"table {table.name}: {path}: cannot be read ({' '.join(str(error).split())})") from error
    config = {section: dict(config.get(section) or {}) for section in _SECTIONS}
    changes = [table.tasks[cell.task], table.variants[cell.variant], cell.entry.set]
    changes += [table.quick.get("set") or {}] if quick else []
    for change in changes:
        for section, values in change.items():
            config[section] |= copy.deepcopy(values)
    text = config["run"].get("text")
    config["run"] |= {key: value for key, value in given.items() if value and (key != "text" or text is not None)}
    config["trainer"]["seed"] = cell.seed
    if cell.sparsity is not None:
        config["run"]["sparsity"] = cell.sparsity
    if cell.needs is not None:
        config["settings"]["mask"] = str((output / cell.needs.name).resolve())
        config["run"].pop("text", None)
    return config


def run_cells(
    table: Table, cells: Sequence[Cell], output: Path, given: Mapping[str, Any], *, jobs: int, quick: bool
) -> dict[Cell, dict[str, Any]]:
    """Runs what is not done yet, `jobs` at a time, and returns the results of all that ended well.

    Every cell is a run of `python -m sparsebert.train` in a folder of its own under `output`. A cell whose run began
    is gone on with. A failed one is reported, the others run on. After Ctrl-C the runs under way save and stop.

    Raises:
        UserError: another grid is running in this folder.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"output {output}: a grid is running there; wait for it, or name another folder") from error
        return _run_cells(table, cells, output, given, jobs, quick)


def _run_cells(
    table: Table, cells: Sequence[Cell], output: Path, given: Mapping[str, Any], jobs: int, quick: bool
) -> dict[Cell, dict[str, Any]]:
    waiting = [cell for cell in cells if not _done(output, cell)]
    print(f"{table.name}: {len(cells)} runs, {len(cells) - len(waiting)} of them done before", flush=True)
    failed: set[str] = set()
    running: dict[Cell, tuple[subprocess.Popen[bytes], float]] = {}
    try:
        while waiting or running:
            ready = [c for c in waiting if c.needs is None or _done(output, c.needs)]
            for cell in [c for c in waiting if c.needs is not None and c.needs.name in failed]:
                print(f"left out: {cell.name} needs {cell.needs.name if cell.needs else ''}, which failed", flush=True)
                failed.add(cell.name)
                waiting.remove(cell)
            while ready and len(running) < jobs:
                cell = ready.pop(0)
                waiting.remove(cell)
                config = configuration(table, cell, output, given, quick)
                running[cell] = (_start(cell, config, output, jobs), time.monotonic())
            for cell, (process, begun) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[cell]
                if _done(output, cell):
                    print(
                        f"{cell.name}: {_result(output, cell)['score']:.4f}, {time.monotonic() - begun:.0f} s",
                        flush=True,
                    )
                else:
                    failed.add(cell.name)
                    print(f"failed ({process.returncode}): {cell.name}; see {output / cell.name}.log", flush=True)
            time.sleep(0.1)
    finally:
        for process, _ in running.values():
            process.send_signal(signal.SIGINT)
        for process, _ in running.values():
            process.wait()
    return {cell: _result(output, cell) for cell in cells if _done(output, cell)}


def _start(cell: Cell, config: Mapping[str, Any], output: Path, jobs: int) -> subprocess.Popen[bytes]:
    folder, file = output / cell.name, output / f"{cell.name}.yaml"
    command = [sys.executable, "-m", "sparsebert.train"]
    if (folder / "config.yaml").is_file():
        command += ["--resume", str(folder)]
    else:
        write_text(file, yaml.safe_dump(dict(config), sort_keys=False))
        command += ["--config", str(file), "--output", str(folder)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // jobs))} if jobs > 1 else None
    with open(output / f"{cell.name}.log", "a", encoding="utf-8") as log:
        # A session of its own: Ctrl-C reaches it through this process alone, once.
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def _done(output: Path, cell: Cell) -> bool:
    return (output / cell.name / "result.json").is_file()


def _result(output: Path, cell: Cell) -> dict[str, Any]:
    folder = output / cell.name
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if "train_score" in result:
        result["curve"] = _curve(folder / "metrics.jsonl", result["metric"])
    return result


def _curve(file: Path, metric: str) -> list[dict[str, float]]:
    """The score on what is trained on and on the slice held out of it, each time both were watched, in order."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name, key in (("held_out", f"eval_{metric}"), ("train", f"eval_train_{metric}")):
            if key in row:
                found.setdefault((row["phase"], row["step"]), {})[name] = row[key]
    return [scores for scores in found.values() if len(scores) == 2]
