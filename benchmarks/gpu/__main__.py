"""The command: see the package. Loads nothing heavy: a worker measures, this reads what it reports and writes it."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import benchmarks.gpu as package
from benchmarks.gpu import rows
from benchmarks.gpu.worker import BROKEN, PARTS, ROOT

RESULTS = ROOT / "benchmarks" / "results"
_RESTARTS = 30
_LEAST = 25.0
"""Seconds: with fewer left no worker is begun."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts; 0, or 1 where something was red, or 2 where nothing could be measured."""
    options = _parse(arguments)
    # In the rehearsal one worker does them all: it is the imports that take long.
    groups = [options.part] if options.rehearse else [[part] for part in options.part]
    worst, ceiling, end = 0, None, time.monotonic() + options.within
    for group in groups:
        options.budget = min(options.budget, end - time.monotonic())
        if options.budget < _LEAST and not options.rehearse:
            print(f"{', '.join(group)}: nothing, the time was spent", flush=True)
            continue
        session = _Session(options, group, ceiling)
        worst = max(worst, session.run())
        ceiling = session.ceiling
        if session.refused:
            print(f"error: {session.refused}", file=sys.stderr)
            return 2
    return worst


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=package.__doc__, formatter_class=formatter)
    parser.add_argument(
        "--part",
        action="append",
        choices=[*PARTS, "all"],
        required=True,
        help="may be repeated, in the order to be run",
    )
    parser.add_argument("--out", type=Path, help="folder for the results (default: benchmarks/results/<device>)")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for each part (default 540)")
    parser.add_argument("--within", type=float, default=math.inf, help="seconds for all parts together")
    parser.add_argument("--device", help="name of the folder under benchmarks/results, in place of the GPU's own")
    parser.add_argument("--rehearse", action="store_true", help="run every cell on the CPU with tiny shapes; no times")
    parser.add_argument("--only", default="", help="only the cells whose name has this word in it")
    parser.add_argument("--runs", nargs="*", default=[], help="folders of finished runs, for the part model")
    parser.add_argument("--data-dir", help="folder of a task's files, for the part train (default: made up)")
    parser.add_argument("--model", help="a checkpoint, for the part train (default: BERT-base, random)")
    options = parser.parse_args(arguments)
    options.part = list(PARTS) if "all" in options.part else list(dict.fromkeys(options.part))
    if not 0 < options.budget < 86400:
        parser.error(f"--budget {options.budget:g}: expected seconds, more than 0")
    if not options.within > 0:
        parser.error(f"--within {options.within:g}: expected seconds, more than 0")
    for folder in (*options.runs, *filter(None, (options.data_dir, options.model))):
        if not Path(folder).exists():
            parser.error(f"{folder}: there is no such folder")
    return options


class _Session:
    """One worker after another, until the parts are done or their time is spent."""

    def __init__(
        self, options: argparse.Namespace, parts: Sequence[str], ceiling: dict[str, float] | None = None
    ) -> None:
        self.options, self.parts = options, list(parts)
        self.head: dict[str, Any] = {}
        # What an earlier part of this command has measured: they share the denominators.
        self.ceiling = ceiling
        self.rows: dict[str, list[rows.Row]] = {part: [] for part in parts}
        self.cells: dict[str, list[str]] = {}
        self.done: set[str] = set()
        self.refused = ""
        self.present: dict[str, Any] | None = None
        self.since = 0.0
        self.late = False
        self.next = 0

    def run(self) -> int:
        begun = time.monotonic()
        end = begun + self.options.budget
        folder = tempfile.TemporaryDirectory(prefix="sparsebert-gpu-")
        with folder:
            for turn in range(_RESTARTS + 1):
                left = end - time.monotonic()
                if turn and left < _LEAST and not self.options.rehearse:
                    break
                status = self._worker(Path(folder.name) / f"events{turn}", left, end)
                if self.refused or self.done == set(self.parts):
                    break
                if self._fell(status):
                    break
        self._rest()
        self._write(self.parts)
        red = sum(row["kind"] == "red" for found in self.rows.values() for row in found)
        took = time.monotonic() - begun
        print(f"{', '.join(self.parts)}: {self._count()}, {took:.0f} s", flush=True)
        return int(red > 0)

    def _count(self) -> str:
        kinds = [row["kind"] for found in self.rows.values() for row in found]
        named = {"speed": "timed", "fact": "other", "red": "red", "skipped": "skipped"}
        return ", ".join(f"{kinds.count(kind)} {word}" for kind, word in named.items() if kind in kinds) or "nothing"

    def _worker(self, events: Path, left: float, end: float) -> int:
        """Runs one worker to its end, or ends it; gives its exit status."""
        events.touch()
        options = {name: getattr(self.options, name) for name in ("only", "runs", "data_dir", "model")}
        plan = {
            "events": str(events), "parts": self.parts, "budget": left, "skip": self.next, "options": options,
            "rehearse": self.options.rehearse, "ceiling": self.ceiling,
        }  # fmt: skip
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if self.options.rehearse:
            environment["TRITON_INTERPRET"] = "1"
            environment.pop("SPARSEBERT_BACKEND", None)
        command = [sys.executable, "-m", "benchmarks.gpu.worker"]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
        assert worker.stdin is not None
        worker.stdin.write(json.dumps(plan))
        worker.stdin.close()
        self.present, self.since = None, time.monotonic()
        with events.open(encoding="utf-8") as file:
            while worker.poll() is None:
                time.sleep(0.1)
                self._read(file)
                self.late = not self.options.rehearse and time.monotonic() > end
                if self.late or self._hangs():
                    worker.kill()
                    worker.wait()
            self._read(file)
        return worker.returncode

    def _hangs(self) -> bool:
        if self.options.rehearse or self.present is None:
            return False
        return time.monotonic() - self.since > self.present["seconds"]

    def _read(self, file: Any) -> None:
        """Takes what the worker has said since; a line that is not whole yet is left for the next time."""
        while True:
            place = file.tell()
            line = file.readline()
            if not line.endswith("\n"):
                file.seek(place)
                return
            self._take(json.loads(line))

    def _take(self, found: dict[str, Any]) -> None:
        event, part = found["event"], found.get("part", "")
        if event == "head":
            self.head = found["head"]
            print(", ".join(f"{name} {value}" for name, value in self.head.items()), flush=True)
        elif event == "refused":
            self.refused = found["why"]
        elif event == "ceiling":
            self.ceiling = self.head["ceilings"] = found["ceiling"]
        elif event == "cells":
            self.cells[part] = found["names"]
        elif event == "begin":
            self.present, self.since = found, time.monotonic()
        elif event == "end":
            self.present, self.next = None, found["index"] + 1
        elif event == "row":
            self.rows[part].append(found["row"])
            print(rows.summary(found["row"]), flush=True)
            self._write([part])
        elif event == "done":
            self.done.add(part)
            self.next = 0

    def _fell(self, status: int) -> bool:
        """Notes what ended a worker; True where another would not come further."""
        if self.present is None:
            # Between cells: after a cell that left the device unusable another worker goes on.
            if status == BROKEN:
                return False
            self._add(self.parts[0], {"cell": "worker", "case": {}}, f"the worker ended with status {status}")
            return True
        why = f"ended the process (status {status})"
        if self.late:
            why = "the part's time was spent while it ran"
        elif self._hangs():
            why = f"ended after {self.present['seconds']:.0f} s: it hangs"
        self._add(self.present["part"], self.present, why, "skipped" if self.late else "red")
        self.next = self.present["index"] + 1
        return self.late

    def _add(self, part: str, cell: dict[str, Any], why: str, kind: str = "red") -> None:
        row = {"kind": kind, "cell": cell["cell"], "case": cell["case"], "why": why}
        self.rows[part].append(row)
        print(rows.summary(row), flush=True)

    def _rest(self) -> None:
        """Says what was not come to."""
        for part in self.parts:
            if part not in self.done and not self.refused:
                for name in self.cells.get(part, [])[self.next :]:
                    self.rows[part].append({"kind": "skipped", "cell": name, "case": {}, "why": "time was spent"})

    def _folder(self) -> Path | None:
        """Where results go; a rehearsal leaves none but where it is told to."""
        if self.options.out is not None:
            return Path(self.options.out)
        if self.options.rehearse or not (self.options.device or self.head):
            return None
        return RESULTS / rows.slug(self.options.device or self.head["device"])

    def _write(self, parts: Sequence[str]) -> None:
        folder = self._folder()
        if folder is None:
            return
        for part in parts:
            kinds = [row["kind"] for row in self.rows[part]]
            note = f"`python -m benchmarks.gpu --part {part} --budget {self.options.budget:g}`: {len(kinds)} rows, "
            note += f"{kinds.count('red')} red, {kinds.count('skipped')} skipped."
            if self.options.rehearse:
                note += " A rehearsal on the CPU: the times mean nothing."
            rows.write(folder, part, self.head, self.rows[part], note)


if __name__ == "__main__":
    sys.exit(main())
