"""`python -m sparsebert.benchmark RUN|MODEL`: dense model and subnetwork side by side: speed, memory and accuracy."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from sparsebert.errors import UserError
from sparsebert.training.command import run_command

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help says how)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, or 2 for a user's error."""
    return run_command(_run, argv)


def _run(argv: Sequence[str]) -> int:
    given = _parser().parse_args(argv)

    from sparsebert.reports.measure import Settings, measure
    from sparsebert.reports.speed_table import markdown, terminal
    from sparsebert.reports.subject import load_subject
    from sparsebert.training.disk import guard_disk
    from sparsebert.training.folder import write_text
    from sparsebert.training.quiet import quiet

    quiet()
    words: dict[str, Any]
    words = {name: _split(value) if isinstance(value, list) else value for name, value in vars(given).items()}
    settings = Settings(**{name: value for name, value in words.items() if name in Settings.__dataclass_fields__})
    subject = load_subject(given.model, given.pattern, given.sparsity)
    output = given.output or (subject.folder.root if subject.folder is not None else None)
    if output is not None:
        # Now rather than after minutes.
        with guard_disk(output, new=True):
            output.mkdir(parents=True, exist_ok=True)
    # The report is for others too: where a folder lies on this machine is nobody else's business.
    shown = [Path(word).name if os.path.isabs(word) else word for word in argv]
    command = shlex.join(["python", "-m", "sparsebert.benchmark", *shown])
    report = measure(subject, settings, command, lambda line: print(line, file=sys.stderr, flush=True))
    if output is not None:
        with guard_disk(output):
            write_text(output / "benchmark.json", json.dumps(report, indent=1) + "\n")
            write_text(output / "benchmark.md", markdown(report))
    if given.json:
        print(json.dumps(report))
    else:
        print(terminal(report))
        print(f"\nwritten: {output / 'benchmark.json'} and .md" if output else "\nnot written; give --output FOLDER")
    return 0


def _split(values: list[Any]) -> tuple[Any, ...]:
    """Several words of one flag, with blanks or commas between them."""
    parts = [part for value in values for part in (value.split(",") if isinstance(value, str) else [value])]
    return tuple(part for part in parts if part != "")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m sparsebert.benchmark",
        description="Speed, memory and accuracy of a model and of its subnetwork in every format that fits, "
        "timed in turns with the best dense paths.",
    )
    add = parser.add_argument
    add("model", metavar="RUN|MODEL", help="a run's folder; a checkpoint's folder or hub id; or demo")
    add("--batch-sizes", type=int, nargs="+", default=[1, 8], help="sentences of a batch [1 8]")
    add("--seq-lens", type=int, nargs="+", help="tokens of a sentence [128, or what the model can]")
    add("--lengths", nargs="+", default=["full", "real"], help="full, real (the run's own data, else SST-2's) [both]")
    add("--threads", type=int, help="torch's threads, and those of other software [what torch takes]")
    add("--device", help="cpu or cuda [the GPU where there is one]")
    add("--against", nargs="*", help="openvino, onnxruntime, compile [the first two where they are installed]")
    add("--formats", nargs="+", help="unstructured, blocks:RxC, semi_structured:n:m, compact, auto [all that fit]")
    add("--precisions", nargs="+", help="fp32, bf16 [fp32, and bf16 where the hardware has it]")
    add("--repeats", type=int, default=20, help="rounds in which every variant is timed once [20]")
    add(
        "--seconds-budget", type=float, default=300.0, help="for all rounds of whole models; 3 are taken at least [300]"
    )
    add("--seed", type=int, default=0, help="of tokens and random masks [0]")
    add("--pattern", help="for a model without masks: prune it by magnitude to measure speed alone")
    add("--sparsity", type=float, help="of that pruning")
    add("--score", action="store_true", help="score every variant on the run's validation set")
    add("--break-even", action="store_true", help="measure from which sparsity on each layer is faster than dense")
    add(
        "--what-if",
        action=argparse.BooleanOptionalAction,
        help="measure other patterns by random masks [where the subnetwork is not faster]",
    )
    add(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure each variant's memory in a process of its own [yes]",
    )
    add("--data-dir", help="where the run's data are now, if they have moved")
    add("--output", type=Path, help="folder of benchmark.json and benchmark.md [the run's]")
    add("--json", action="store_true", help="print the report as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
