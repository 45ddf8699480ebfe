"""Accuracy of the methods at equal sparsity: the comparison of Adapting by Pruning, as a grid of training runs.

    python -m benchmarks.accuracy --data-dir DIR --output runs/accuracy [--tasks demo stsb sst2] [--seeds 42]

Every cell is one `python -m sparsebert.train` command, run in a folder of its own; finished cells are skipped and
interrupted ones go on, so the same command continues a grid. The table is written after every cell. Kept weights are
the pre-trained ones in all pruned cells (`--weights pretrained`), as in the paper.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

# Steps of every training phase: three epochs of the demo and of STS-B, as many for the far larger SST-2.
STEPS = {"demo": 700, "demo_imdb": 700, "stsb": 540, "sst2": 700, "rte": 234}

# Of each of IMP's rounds (4 to 50 %, 11 to 90 %): an epoch of STS-B.
ROUND_STEPS = 180


@dataclass(frozen=True)
class Cell:
    """One training run of the grid."""

    task: str
    method: str
    sparsity: float | None
    seed: int

    @property
    def name(self) -> str:
        level = "" if self.sparsity is None else f"-{self.sparsity:g}"
        return f"{self.task}-{self.method}{level}-{self.seed}"

    def arguments(self, data_dir: str | None) -> list[str]:
        """Arguments of `python -m sparsebert.train`, without the output."""
        words = ["--method", self.method, "--task", self.task, "--seed", str(self.seed)]
        words += ["--max-steps", str(STEPS[self.task]), "--no-untouched"]
        if self.sparsity is not None:
            words += ["--sparsity", f"{self.sparsity:g}"]
            if self.method != "adapt_prune":
                words += ["--weights", "pretrained"]
            if self.method == "imp":
                words += ["--round-steps", str(ROUND_STEPS)]
        if data_dir is not None and not self.task.startswith("demo"):
            words += ["--data-dir", data_dir]
        return words


def cells(tasks: list[str], seeds: list[int], sparsities: list[float], methods: list[str]) -> list[Cell]:
    """The grid, cheap cells first."""
    dense = [method for method in methods if method in ("feature_extraction", "finetune")]
    sparse = [method for method in methods if method not in dense]
    grid = [Cell(task, method, None, seed) for seed in seeds for task in tasks for method in dense]
    for method in sparse:
        grid += [Cell(task, method, s, seed) for seed in seeds for task in tasks for s in sparsities]
    return grid


def run(cell: Cell, output: Path, data_dir: str | None) -> dict[str, Any] | None:
    """The cell's result, from its folder if it is there; None if the run failed."""
    folder = output / cell.name
    if not (folder / "result.json").is_file():
        command = [sys.executable, "-m", "sparsebert.train"]
        begun = (folder / "config.yaml").is_file()
        command += ["--resume", str(folder)] if begun else [*cell.arguments(data_dir), "--output", str(folder)]
        print("+", shlex.join(command[1:]), flush=True)
        with open(output / f"{cell.name}.log", "a", encoding="utf-8") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            print(f"failed ({done.returncode}): see {cell.name}.log", flush=True)
            return None
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def table(results: dict[Cell, dict[str, Any]]) -> str:
    """Markdown: a row a task and sparsity, a column a method; mean and, over several seeds, standard deviation."""
    methods = list(dict.fromkeys(cell.method for cell in results))
    rows = sorted({(cell.task, cell.sparsity or 0.0) for cell in results})
    lines = ["| task | metric | sparsity of the encoder | " + " | ".join(methods) + " |"]
    lines.append("|---|---|---|" + "---|" * len(methods))
    for task, sparsity in rows:
        texts = []
        metric = ""
        for method in methods:
            found = [r for c, r in results.items() if (c.task, c.sparsity or 0.0, c.method) == (task, sparsity, method)]
            scores = [result["score"] for result in found]
            metric = found[0]["metric"] if found else metric
            text = f"{statistics.mean(scores):.3f}" if scores else ""
            texts.append(text + (f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""))
        lines.append(f"| {task} | {metric} | {sparsity:.0%} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def write(results: dict[Cell, dict[str, Any]], name: str, command: str) -> None:
    """Writes the table and everything it stands on under benchmarks/results/."""
    RESULTS.mkdir(exist_ok=True)
    any_result = next(iter(results.values()))
    seeds = sorted({cell.seed for cell in results})
    head = [
        "# Accuracy of the methods at equal sparsity\n",
        f"Made by `{command}`; model {any_result['model']['source']}, seeds {seeds}, precision "
        f"{any_result['precision']}, {any_result['hardware']['cpu']}, torch {any_result['versions']['torch']}, "
        f"transformers {any_result['versions']['transformers']}.\n",
        "Pruned cells keep pre-trained weights and train the head alone beside the mask. Scores are of the validation "
        "set at the last step; no checkpoint was chosen by it.\n",
    ]
    commands = [
        "python -m sparsebert.train " + shlex.join(cell.arguments("DIR")) + f" --output runs/accuracy/{cell.name}"
        for cell in results
    ]
    text = "\n".join(head) + "\n" + table(results) + "\nThe cells:\n\n```\n" + "\n".join(commands) + "\n```\n"
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    kept = ("method", "task", "metric", "score", "metrics", "seed", "seconds", "precision", "versions", "hardware")
    records = [
        {**{key: result[key] for key in kept}, "sparsity": result["sparsity"]["encoder"], "target": cell.sparsity}
        for cell, result in results.items()
    ]
    (RESULTS / f"{name}.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with GLUE as parquet; the demo needs none")
    parser.add_argument("--output", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--tasks", nargs="+", default=["demo", "stsb", "sst2"], choices=sorted(STEPS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.9])
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["feature_extraction", "finetune", "adapt_prune", "magnitude", "random", "imp"],
    )
    parser.add_argument("--name", default="accuracy", help="name of the files under benchmarks/results")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    results: dict[Cell, dict[str, Any]] = {}
    command = "python -m benchmarks.accuracy " + shlex.join(
        ["--data-dir", "DIR", "--tasks", *given.tasks, "--seeds", *map(str, given.seeds)]
    )
    for cell in cells(given.tasks, given.seeds, given.sparsities, given.methods):
        result = run(cell, given.output, given.data_dir)
        if result is not None:
            results[cell] = result
            write(results, given.name, command)
            print(f"{cell.name}: {result['score']:.4f}", flush=True)


if __name__ == "__main__":
    main()
