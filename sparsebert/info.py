"""What sparsebert finds on this machine: versions, processor, compilers, and which backend serves which op.

    python -m sparsebert.info          a table (plain text in a pipe)
    python -m sparsebert.info --json   the same as JSON

Building the compiled kernels, where they are neither installed nor cached, is part of finding out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["collect", "main"]

PACKAGES = ("torch", "triton", "transformers", "datasets", "accelerate", "safetensors", "numpy", "scikit-learn")


def collect() -> dict[str, Any]:
    """Everything the command shows, as plain values.

    Keys: `versions`, `cpu`, `threads`, `tools`, `binaries`, `gpu`, `environment`, and `ops`: op -> backend ->
    `"available"` or why not.
    """
    from sparsebert import _build, _load

    tools = _build.find_tools()
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "threads": _threads(),
        "tools": {
            "compiler": _tool(tools.compiler, "no C++ compiler found; set CXX or install g++"),
            "nvcc": _tool(tools.nvcc, "not found in $CUDA_HOME or /usr/local/cuda*"),
            "ninja": tools.ninja or "not found; pip install ninja",
            "pybind11": "found" if tools.pybind11 else "not found; pip install pybind11",
            "torch headers": str(tools.torch) if tools.torch else "not found",
        },
        "binaries": _binaries(_load, _build),
        "gpu": _gpu(),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith("SPARSEBERT_")},
        "ops": _ops(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m sparsebert.info`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sparsebert.info", description="What sparsebert finds here.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    from sparsebert.errors import UserError

    try:
        found = collect()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(found, indent=2))
    elif sys.stdout.isatty():
        _print_rich(found)
    else:
        _print_plain(found)
    return 0


def _versions() -> dict[str, str]:
    from sparsebert import __version__

    versions = {"sparsebert": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _cpu() -> dict[str, Any]:
    from sparsebert import _load

    found: dict[str, Any] = {"model": _cpu_model(), "cores": os.cpu_count()}
    host = _load.host()
    if host is None:
        found["features"] = "unknown: the host module was not built"
        return found
    found["vendor"] = host.cpu_vendor()
    found["features"] = [name for name, there in host.cpu_features().items() if there]
    try:
        found["isa used"] = host.isa()
    except RuntimeError as error:
        found["isa used"] = str(error)
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _threads() -> dict[str, int]:
    import torch

    return {"torch intra-op": torch.get_num_threads(), "torch inter-op": torch.get_num_interop_threads()}


def _tool(path: str | None, missing: str) -> str:
    from sparsebert import _build

    return missing if path is None else f"{path} ({_build.version_of(path)})"


def _binaries(load: Any, build: Any) -> dict[str, Any]:
    try:
        folder = load.library_dir()
    except build.BuildError as error:
        return {"folder": "none", "reason": str(error)}
    record = build.read_record(folder)
    return {
        "folder": str(folder),
        "files": record.get("files", []),
        "not built": record.get("failed", {}),
        "compiler": record.get("compiler"),
        "flags": " ".join(record.get("flags", [])),
    }


def _gpu() -> list[dict[str, Any]] | str:
    import torch

    if torch.version.cuda is None:
        return f"none: torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return "none: torch sees no CUDA device"
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "compute capability": f"{properties.major}.{properties.minor}",
                "memory GiB": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return devices


def _ops() -> dict[str, dict[str, str]]:
    importlib.import_module("sparsebert.ops")  # fills OPS
    from sparsebert.ops._backend import BACKENDS, OPS, forced_backend

    # A wrong word in SPARSEBERT_BACKEND is an error here as everywhere.
    forced_backend()
    return {name: {backend: OPS[name].missing(backend) or "available" for backend in BACKENDS} for name in sorted(OPS)}


def _sections(found: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The collected values as titled lists of pairs; the table of ops is drawn apart."""
    sections = []
    for title in ("versions", "cpu", "threads", "tools", "binaries", "gpu", "environment"):
        value = found[title]
        if isinstance(value, list):
            rows = [(f"{index}", ", ".join(f"{k} {v}" for k, v in item.items())) for index, item in enumerate(value)]
        elif isinstance(value, dict):
            rows = [(key, _text(item)) for key, item in value.items()]
        else:
            rows = [("", str(value))]
        if rows:
            sections.append((title, rows))
    return sections


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {item}" for key, item in value.items()) or "-"
    if isinstance(value, list):
        return " ".join(str(item) for item in value) or "-"
    return "-" if value is None else str(value)


def _op_rows(ops: dict[str, dict[str, str]]) -> tuple[list[tuple[str, ...]], list[str]]:
    """Rows of `yes` or a footnote's number, and the footnotes: the same few reasons repeat over the ops."""
    reasons: list[str] = []
    rows = []
    for name, backends in ops.items():
        cells = [name]
        for said in backends.values():
            if said == "available":
                cells.append("yes")
                continue
            if said not in reasons:
                reasons.append(said)
            cells.append(f"no ({reasons.index(said) + 1})")
        rows.append(tuple(cells))
    return rows, [f"({number}) {reason}" for number, reason in enumerate(reasons, 1)]


def _print_plain(found: dict[str, Any]) -> None:
    for title, pairs in _sections(found):
        print(title)
        for key, value in pairs:
            print(f"  {key:<16} {value}")
    rows, notes = _op_rows(found["ops"])
    heads = ("op", *next(iter(found["ops"].values())))
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    print("ops")
    for row in (heads, *rows):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for note in notes:
        print(f"  {note}")


def _print_rich(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for title, pairs in _sections(found):
        table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
        for key, value in pairs:
            table.add_row(f"[bold]{escape(key)}[/bold]", escape(value))
        console.print(table)
        console.print()
    rows, notes = _op_rows(found["ops"])
    table = Table("op", *next(iter(found["ops"].values())), title="ops", title_justify="left")
    for name, *cells in rows:
        table.add_row(name, *(f"[green]{cell}[/green]" if cell == "yes" else escape(cell) for cell in cells))
    console.print(table)
    for note in notes:
        console.print(escape(note))


if __name__ == "__main__":
    sys.exit(main())
