"""What every benchmark shares: interleaved timing, tables, and where published numbers go.

    pytest benchmarks/                        prints the tables
    pytest benchmarks/ --full                 whole grids instead of a few cells of them
    pytest benchmarks/ --record               also writes benchmarks/results/<device>/<table>.{json,md}
    pytest benchmarks/ --threads 1 --clock cpu   processor time of one thread, for a machine that others share

Candidates of one row are timed in turns within one process, so that a change of the machine's pace meets them all;
what is reported is the median and, as ratios, medians of the same row.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsebert.reports.timing import STOPWATCHES, Timing, interleave

RESULTS = Path(__file__).resolve().parent / "results"
CLOCKS = ("cpu", "wall")
SEED = 0


@dataclass
class Bench:
    """The fixture: times candidates in turns and collects the tables of a session."""

    repeats: int
    clock: str
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def interleave(self, candidates: Mapping[str, Callable[[], Any]], repeats: int | None = None) -> dict[str, Timing]:
        """Seconds of every candidate, timed in turns; see `sparsebert.reports.timing.interleave`."""
        return interleave(candidates, repeats or self.repeats, STOPWATCHES[self.clock])

    def row(self, table: str, case: Mapping[str, Any], timings: Mapping[str, Timing], subject: str) -> None:
        """Add a row: the case, milliseconds of every candidate, and how many times slower than `subject` each is."""
        row = dict(case)
        for name, timing in timings.items():
            row[f"{name} ms"] = round(timing.median * 1e3, 4)
            row[f"{name} range"] = [round(timing.low * 1e3, 4), round(timing.high * 1e3, 4)]
        for name, timing in timings.items():
            if name != subject:
                row[f"{name} / {subject}"] = round(timing.median / timings[subject].median, 2)
        self.tables.setdefault(table, []).append(row)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sparsebert benchmarks")
    group.addoption("--record", action="store_true", help="write the tables under benchmarks/results/<device>/")
    group.addoption("--full", action="store_true", help="the whole grid instead of a few cells of it")
    group.addoption("--repeats", type=int, default=7, help="rounds of a row (default 7)")
    group.addoption("--threads", type=int, default=0, help="torch's threads (default: what torch takes)")
    group.addoption("--clock", choices=CLOCKS, default="wall", help="what is timed (default wall)")


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Bench:
    """The session's `Bench`."""
    config = request.config
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))
    found = Bench(config.getoption("--repeats"), config.getoption("--clock"))
    config.stash[_KEY] = found
    return found


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether the whole grids are asked for."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same data in every run."""
    torch.manual_seed(SEED)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = config.stash.get(_KEY, None)
    if found is None:
        return
    conditions = _conditions(found)
    for table, rows in found.tables.items():
        terminalreporter.section(table)
        terminalreporter.write_line(_markdown_table(rows))
        if config.getoption("--record"):
            folder = RESULTS / _slug(conditions)
            folder.mkdir(parents=True, exist_ok=True)
            record = {"table": table, "conditions": conditions, "rows": rows}
            (folder / f"{table}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            (folder / f"{table}.md").write_text(_markdown(table, conditions, rows), encoding="utf-8")
            terminalreporter.write_line(f"written: {folder / table}.json and .md")


_KEY = pytest.StashKey[Bench]()


def _conditions(bench: Bench) -> dict[str, Any]:
    packages = ("sparsebert", "torch", "openvino", "triton", "transformers", "numpy")
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_model(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": bench.clock,
        "repeats": bench.repeats,
        "seed": SEED,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "versions": versions,
        "command": " ".join(["pytest", *(Path(word).name if word.startswith("/") else word for word in sys.argv[1:])]),
    }


def _cpu_model() -> str:
    """Model name, with family and model number where the name alone says little (virtual machines)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    first = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text.partition("\n\n")[0], re.MULTILINE))
    name = first.get("model name", platform.machine())
    return name if re.search(r"\d", name) else f"{name} family {first.get('cpu family')} model {first.get('model')}"


def _slug(conditions: Mapping[str, Any]) -> str:
    words = str(conditions["device"])
    if conditions["device"] == conditions["cpu"]:
        words += f" {conditions['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def _markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = [name for name in rows[0] if not name.endswith(" range")]
    cells = [[str(row.get(name, "")) for name in heads] for row in rows]
    widths = [max(len(line[column]) for line in (heads, *cells)) for column in range(len(heads))]
    lines = [heads, ["-" * width for width in widths], *cells]
    return "\n".join("| " + " | ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _markdown(table: str, conditions: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    said = [f"{name}: {value}" for name, value in conditions.items() if name != "versions"]
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    lead = "Milliseconds are medians of candidates timed in turns; a ratio above 1 means slower than the subject."
    return (
        f"# {table}\n\n{lead}\n\n"
        + "\n".join(f"- {line}" for line in [*said, versions])
        + (f"\n\n{_markdown_table(rows)}\n")
    )
