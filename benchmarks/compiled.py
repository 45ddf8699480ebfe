"""Compiles every Triton kernel for sm_80, sm_90 and sm_100, which needs no GPU, and tells what each takes.

python -m benchmarks.compiled [OP ...]      a table of registers, spills and shared memory
python -m benchmarks.compiled --json        the same as JSON
python -m benchmarks.compiled --brief       one choice of tiles for every kernel and dtype
python -m benchmarks.compiled --record      also writes benchmarks/results/compiled.md
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = (80, 90, 100)


def ops() -> list[str]:
    """Every op that has a Triton kernel."""
    return sorted(path.stem for path in (ROOT / "kernels").glob("*.py") if not path.stem.startswith("_"))


def compiled(names: Sequence[str], brief: bool = False) -> Iterator[dict[str, Any]]:
    """A row for every kernel of these ops, as it may be launched, and architecture."""
    for name in names:
        specimens = importlib.import_module(f"sparsebert.kernels.{name}").specimens()
        if brief:
            kinds = {(s.kernel.__name__, *sorted(map(str, s.signature.items()))): s for s in reversed(specimens)}
            specimens = list(kinds.values())
        for specimen in specimens:
            for architecture in ARCHITECTURES:
                if specimen.least <= architecture <= specimen.most:
                    yield {"op": name, "kernel": specimen.label, **_compile(specimen, architecture)}


def _compile(specimen: Any, architecture: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {**specimen.signature, **dict.fromkeys(specimen.constants, "constexpr")}
    order = specimen.kernel.arg_names
    aligned = {}
    for i, name in enumerate(order):
        # A tuple's members have places of their own.
        kinds = signature[name] if isinstance(signature[name], tuple) else (signature[name],)
        places = [(i, j) for j in range(len(kinds))] if isinstance(signature[name], tuple) else [(i,)]
        for place, kind in zip(places, kinds, strict=True):
            if kind.startswith("*") or name in specimen.divisible_by_16:
                aligned[place] = [["tt.divisibility", 16]]
    source = ASTSource(
        specimen.kernel,
        signature={name: signature[name] for name in order},
        constexprs=dict(specimen.constants),
        attrs=aligned,
    )
    options = {"num_warps": specimen.warps, "num_stages": specimen.stages}
    try:
        done = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    except Exception as error:  # whatever the compiler says belongs in the table
        return {"sm": architecture, "error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"}
    usage = _usage(done.asm["cubin"])
    return {"sm": architecture, **usage, "shared": done.metadata.shared, "warps": specimen.warps}


def _usage(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(found["REG"]), "spilled": int(found["STACK"]) + int(found["LOCAL"])}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown; the architectures side by side."""
    kernels: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        kernels.setdefault((row["op"], row["kernel"]), {})[row["sm"]] = row
    head = "".join(f" sm_{a}: registers | spilled, bytes | shared, KiB |" for a in ARCHITECTURES)
    lines = [f"| op | kernel |{head}", "|---|---|" + "---|" * 3 * len(ARCHITECTURES)]
    for (op, kernel), by in kernels.items():
        cells = ""
        for architecture in ARCHITECTURES:
            row = by.get(architecture)
            if row is None:
                cells += " - | - | - |"
            elif "error" in row:
                cells += f" {row['error']} | | |"
            else:
                cells += f" {row['registers']} | {row['spilled']} | {row['shared'] / 1024:.1f} |"
        lines.append(f"| `{op}` | {kernel} |{cells}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__)
    parser.add_argument("op", nargs="*", help="only these ops (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/compiled.md")
    parser.add_argument("--brief", action="store_true", help="one choice of tiles for every kernel and dtype")
    options = parser.parse_args(arguments)
    rows = list(compiled(options.op or ops(), options.brief))
    print(json.dumps(rows, indent=1) if options.json else table(rows))
    if options.record:
        import triton

        command = "python -m benchmarks.compiled --record" + " --brief" * options.brief
        note = f"Made by `{command}`, Triton {triton.__version__}; no GPU is needed."
        if options.brief:
            note += " One choice of tiles for every kernel and dtype; without `--brief` all of them."
        path = ROOT / "benchmarks" / "results" / "compiled.md"
        path.write_text(f"# What the Triton kernels take, compiled\n\n{note}\n\n{table(rows)}\n", encoding="utf-8")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
