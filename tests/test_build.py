"""Building and finding the compiled libraries: hashes, locks, missing tools, and what the sources promise."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsebert import _build, _load
from sparsebert.ops._backend import OPS

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"

# Stands in for g++: leaves a line in a log and an empty file where the output goes.
COMPILER = """#!/bin/sh
out=; deps=; previous=
for word in "$@"; do
  case "$previous" in -o) out="$word";; -MF) deps="$word";; esac
  previous="$word"
done
[ -n "$deps" ] && : > "$deps"
[ "$out" = _C.so ] && echo link >> "{log}" && sleep 0.3
[ -n "$out" ] && : > "$out"
exit {status}
"""
FIND = "from sparsebert import _load; print(_load.library_dir())"
USE = """
import torch
from sparsebert.ops import select_mask
from sparsebert.ops._backend import OPS
print(select_mask([torch.tensor([3.0, 1.0, 2.0])], 1)[0].tolist(), OPS["select_mask"].missing("cpu"))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the package and its sources without binaries."""
    folder = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("*.so", _build.RECORD, "__pycache__")
    shutil.copytree(ROOT / "sparsebert", folder / "sparsebert", ignore=ignored)
    shutil.copytree(CSRC, folder / "csrc", ignore=ignored)
    return folder


def fake_compiler(folder: Path, status: int = 0) -> str:
    path = folder / f"compiler-{status}"
    path.write_text(COMPILER.format(log=folder / "log", status=status))
    path.chmod(0o755)
    return str(path)


def start(code: str, checkout: Path, **environment: str) -> subprocess.Popen[str]:
    values = {**os.environ, "PYTHONPATH": str(checkout), "SPARSEBERT_CACHE": str(checkout / "cache"), **environment}
    for name in ("SPARSEBERT_BACKEND", "SPARSEBERT_ISA"):
        values.pop(name, None)
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=checkout, env=values, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out.strip(), err


needs_build = pytest.mark.skipif(_build.find_tools().missing() is not None, reason=str(_build.find_tools().missing()))


@needs_build
def test_processes_that_start_together_build_once_and_an_edit_builds_anew(checkout: Path, tmp_path: Path) -> None:
    compiler = fake_compiler(tmp_path)
    together = [finish(process) for process in [start(FIND, checkout, CXX=compiler) for _ in range(3)]]
    assert len({out for out, _ in together}) == 1
    assert sum(err.count("sparsebert: building") for _, err in together) == 1
    assert (tmp_path / "log").read_text().split() == ["link"]
    again, err = finish(start(FIND, checkout, CXX=compiler))
    assert again == together[0][0] and "building" not in err
    assert [path.name for path in (checkout / "cache").iterdir() if path.name.startswith("build-")] == []

    # Binaries beside the package count only while they fit the sources.
    shutil.copytree(again, checkout / "sparsebert", dirs_exist_ok=True)
    assert finish(start(FIND, checkout, CXX=compiler))[0] == str(checkout / "sparsebert")
    with (checkout / "csrc" / "ops.cpp").open("a") as source:
        source.write("// edited\n")
    edited, err = finish(start(FIND, checkout, CXX=compiler))
    assert edited not in (again, str(checkout / "sparsebert")) and err.count("sparsebert: building") == 1


@needs_build
def test_a_compiler_that_fails_leaves_the_reference_and_a_reason(checkout: Path, tmp_path: Path) -> None:
    out, _ = finish(start(USE, checkout, CXX=fake_compiler(tmp_path, status=1)))
    assert out.startswith("[5] compiling failed:") and ".log" in out
    log = Path(out.rpartition("the whole log: ")[2])
    assert "FAILED" in log.read_text()


def test_without_a_compiler_the_reference_serves_and_info_says_why(checkout: Path) -> None:
    code = "import sparsebert.info; sparsebert.info.main(['--json'])"
    out, err = finish(start(code, checkout, CXX="no-such-compiler"))
    said = json.loads(out)
    if sys.platform == "linux" and _build.platform.machine() == "x86_64":
        assert "no C++ compiler" in said["ops"]["select_mask"]["cpu"]
        assert "no C++ compiler" in said["binaries"]["reason"]
    assert said["ops"]["select_mask"]["reference"] == "available" and "building" not in err


@needs_build
def test_a_cache_that_cannot_be_written_is_named(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out, _ = finish(start(USE, checkout, SPARSEBERT_CACHE=str(tmp_path / "file"), CXX=fake_compiler(tmp_path)))
    assert out.startswith("[5] cannot write to") and out.endswith("set SPARSEBERT_CACHE")


def test_the_hash_covers_content_and_names(tmp_path: Path) -> None:
    shutil.copytree(CSRC, tmp_path / "csrc")
    sources = tmp_path / "csrc"
    digest = _build.source_hash(sources)
    assert digest == _build.source_hash(CSRC)
    os.utime(sources / "ops.cpp", (0, 0))
    (sources / "notes.md").write_text("no source")
    assert _build.source_hash(sources) == digest
    (sources / "grid.h").rename(sources / "lattice.h")
    renamed = _build.source_hash(sources)
    (sources / "lattice.h").write_bytes((sources / "lattice.h").read_bytes() + b"\n")
    assert len({digest, renamed, _build.source_hash(sources)}) == 3


@needs_build
def test_a_sanitizer_builds_into_a_folder_of_its_own(checkout: Path, tmp_path: Path) -> None:
    compiler = fake_compiler(tmp_path)
    plain, _ = finish(start(FIND, checkout, CXX=compiler))
    watched, _ = finish(start(FIND, checkout, CXX=compiler, SPARSEBERT_SANITIZE="address,undefined"))
    assert watched != plain and watched.endswith("-address-undefined")
    flags = json.loads((Path(watched) / _build.RECORD).read_text())["flags"]
    assert "-fsanitize=address,undefined" in flags and "-fno-sanitize-recover=all" in flags
    assert finish(start(FIND, checkout, CXX=compiler))[0] == plain
    # Binaries with a sanitizer beside the package do not count for a process without.
    shutil.copytree(watched, checkout / "sparsebert", dirs_exist_ok=True)
    assert finish(start(FIND, checkout, CXX=compiler))[0] == plain
    out, _ = finish(start(USE, checkout, CXX=compiler, SPARSEBERT_SANITIZE="addres"))
    assert out == "[5] SPARSEBERT_SANITIZE: expected address or undefined, got addres"


def test_missing_tools_are_named_one_by_one() -> None:
    tools = _build.find_tools()
    if tools.missing() is not None:
        pytest.skip(str(tools.missing()))
    for name, word in {"torch": "headers", "compiler": "C\\+\\+ compiler", "ninja": "ninja"}.items():
        values = {**vars(tools), name: None}
        assert re.search(word, str(_build.Tools(**values).missing()))


def test_nvcc_is_looked_for_in_cuda_home_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert _build.find_nvcc() == str(nvcc)


@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_cuda_kernels_compile_without_spills(tmp_path: Path, architecture: str) -> None:
    tools = _build.find_tools()
    if tools.nvcc is None:
        pytest.skip("no nvcc in $CUDA_HOME or /usr/local/cuda*")
    if tools.torch is None:
        pytest.skip("torch's headers were not found")
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        flags = [*_build.NVCC_FLAGS, "-gencode", f"arch=compute_{architecture},code=sm_{architecture}", "-Xptxas", "-v"]
        folders = ["-I", str(CSRC), "-I", str(tools.torch / "include")]
        command = [tools.nvcc, *flags, *folders, "-cubin", "-o", str(tmp_path / "kernel.cubin"), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
        assert spills and set(spills) == {("0", "0")}, f"{source.name}: {spills}"


def test_schemas_are_the_references_own() -> None:
    reason = _load.missing("cpu")
    if reason is not None:
        pytest.skip(reason)

    def plain(schema: object) -> str:
        text = re.sub(r"^\w+::", "", str(schema)).replace("SymInt", "int")
        return re.sub(r"\(\w+!\)", "(!)", text)

    compiled_names = set(re.findall(r'"(\w+)\(', (CSRC / "ops.cpp").read_text()))
    assert compiled_names <= set(OPS)
    for name in sorted(compiled_names):
        compiled = getattr(torch.ops.sparsebert, name).default._schema
        assert plain(compiled) == plain(getattr(torch.ops.sparsebert_reference, name).default._schema)


def test_binaries_run_on_other_machines() -> None:
    flags = " ".join((*_build.CXX_FLAGS, *_build.NVCC_FLAGS))
    assert "-march" not in flags and "-mtune" not in flags and "-ffast-math" not in flags


def test_addresses_are_64_bit() -> None:
    for path in sorted(p for p in CSRC.rglob("*") if p.suffix in _build.SUFFIXES):
        text = path.read_text()
        for found in re.finditer(r"for \((?:int|int32_t|unsigned|auto) (\w+) = [^;]*; \1 < ([^;]+);", text):
            # 32-bit counters only over lanes, bits, the members of one n:m group, and what is constant when compiling:
            # template arguments (one capital) and kConstants.
            few = r"\d+|[A-Zmi]|SB_WIDTH|k[A-Z]\w*( / (\d|k[A-Z]\w*))?"
            assert re.fullmatch(few, found.group(2)), f"{path.name}: {found.group(0)}"
        for found in re.finditer(r"\bblockIdx\.[xyz]\b", text):
            before = text[: found.start()]
            assert before.endswith("static_cast<int64_t>("), f"{path.name}: blockIdx not widened first"
