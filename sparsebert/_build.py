"""Compiling csrc/ with ninja: what to build, with which tools, and how to know that binaries fit their sources.

Used by setup.py at install and by `_load` at first use, so it imports nothing but the standard library, torch least of
all: torch's headers are looked for in the environment, not asked of torch. Three files come out: `_C.so` (schemas and
CPU kernels), `_C_cuda.so` (CUDA kernels; only where there is an nvcc) and `_host*.so` (CPU features, without torch).
The first two use torch's stable ABI: one binary serves every Python and every torch from 2.10 on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

__all__ = [
    "BuildError",
    "Tools",
    "build",
    "cuda_flags",
    "cxx_flags",
    "find_tools",
    "read_record",
    "sanitizers",
    "source_dir",
    "source_hash",
    "version_of",
]

# 2.10, the oldest torch whose stable ABI has all that is used here.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# Never -march=native: kernels carry their own per-function targets and are picked at run time.
# gcc 12 warns of its own AVX-512 header, hence the one -Wno.
CXX_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wno-maybe-uninitialized",
    TORCH_TARGET,
)
CUDA_ARCHITECTURES = (
    "arch=compute_80,code=sm_80",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_90,code=compute_90",
)
# USE_CUDA opens the CUDA half of torch's C shims, in a CPU build's headers too.
NVCC_FLAGS = ("-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", TORCH_TARGET, "-DUSE_CUDA")
# What $SPARSEBERT_SANITIZE may name, separated by commas; tests/sanitize.py sets it.
SANITIZERS = ("address", "undefined")
SUFFIXES = {".cpp", ".cu", ".cuh", ".h", ".inc"}
RECORD = "_binaries.json"
HOST = "_host" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")


class BuildError(Exception):
    """The binaries cannot be built; the message says why in a line."""


@dataclass(frozen=True)
class Tools:
    """What a build needs of its surroundings; None for what is not there."""

    compiler: str | None
    ninja: str | None
    torch: Path | None
    """torch's package folder, the one with `include/` and `lib/`."""
    nvcc: str | None
    pybind11: Path | None
    """pybind11's include folder."""

    def missing(self) -> str | None:
        """Why the CPU library cannot be built with these, or None."""
        if sys.platform != "linux" or platform.machine() != "x86_64":
            return f"the compiled kernels are for x86-64 Linux, not {platform.machine()} {sys.platform}"
        if self.torch is None:
            return "torch's headers (torch/include/torch/csrc/stable) were not found; torch >= 2.10 is needed"
        if self.compiler is None:
            return "no C++ compiler: set CXX, or install g++ (>= 10) or clang++ (>= 12)"
        if self.ninja is None:
            return "ninja was not found: pip install ninja"
        return None


@dataclass
class Result:
    """What a build made: file names in its folder, and why an optional library is not among them."""

    files: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def source_dir() -> Path | None:
    """The folder of the C++ sources: inside an installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "csrc", here.parent / "csrc"):
        if (folder / "ops.cpp").is_file():
            return folder
    return None


def source_hash(sources: Path) -> str:
    """Hex digest of the sources, their names and the flags: binaries with another one are stale."""
    digest = hashlib.sha256()
    digest.update("\0".join((*cxx_flags(), *NVCC_FLAGS, *CUDA_ARCHITECTURES, HOST)).encode())
    for path in sorted(p for p in sources.rglob("*") if p.suffix in SUFFIXES):
        digest.update(f"\0{path.relative_to(sources).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def sanitizers() -> list[str]:
    """The sanitizers to build with: the words of `$SPARSEBERT_SANITIZE` ("address,undefined"), none by default.

    Raises:
        BuildError: a word is not one of `SANITIZERS`.
    """
    words = [word for word in os.environ.get("SPARSEBERT_SANITIZE", "").split(",") if word]
    for word in words:
        if word not in SANITIZERS:
            raise BuildError(f"SPARSEBERT_SANITIZE: expected {' or '.join(SANITIZERS)}, got {word}")
    return words


def cxx_flags() -> tuple[str, ...]:
    """The C++ compiler's flags, a sanitizer's included. A finding ends the process, with lines of the sources."""
    words = sanitizers()
    if not words:
        return CXX_FLAGS
    watch = f"-fsanitize={','.join(words)}"
    return (*CXX_FLAGS, "-O1", "-g", "-fno-omit-frame-pointer", watch, "-fno-sanitize-recover=all")


def read_record(folder: Path) -> dict[str, object]:
    """The record a build left in `folder` (`hash`, `files`, `failed`, `compiler`, ...); empty where there is none."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def find_tools() -> Tools:
    """Look for the compiler, ninja, nvcc and the headers, without importing torch."""
    return Tools(_find_compiler(), _find_ninja(), _find_torch(), find_nvcc(), _find_pybind11())


def find_nvcc() -> str | None:
    """nvcc: in $CUDA_HOME, in /usr/local/cuda*, at last on PATH, where it may be a wrapper that points elsewhere."""
    homes = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    homes += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    for home in homes:
        nvcc = home / "bin" / "nvcc"
        if os.access(nvcc, os.X_OK):
            return str(nvcc)
    return shutil.which("nvcc")


def _find_compiler() -> str | None:
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "c++", "clang++"]:
        path = shutil.which(name)
        if path is not None:
            return path
    return None


def _find_ninja() -> str | None:
    spec = importlib.util.find_spec("ninja")
    if spec is not None and spec.submodule_search_locations:
        for folder in spec.submodule_search_locations:
            for candidate in (Path(folder) / "data" / "bin" / "ninja", Path(folder).parents[2] / "bin" / "ninja"):
                if os.access(candidate, os.X_OK):
                    return str(candidate)
    # The script of an environment that is used without being activated.
    return shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))


def _find_torch() -> Path | None:
    loaded = sys.modules.get("torch")
    folders = [Path(str(loaded.__file__)).parent] if loaded is not None and loaded.__file__ else []
    # Under pip's build isolation sys.path leads into a throw-away environment, but sysconfig and site still name the
    # one being installed into.
    roots = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages(), *sys.path]
    folders += [Path(root) / "torch" for root in roots if root]
    for folder in folders:
        if (folder / "include" / "torch" / "csrc" / "stable" / "ops.h").is_file():
            return folder
    return None


def _find_pybind11() -> Path | None:
    spec = importlib.util.find_spec("pybind11")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / "include" / "pybind11" / "pybind11.h").is_file():
            return Path(folder) / "include"
    return None


def cuda_flags(tools: Tools, sources: Path) -> list[str]:
    """nvcc's flags for one of the `.cu` files: architectures, include folders, host compiler."""
    flags = list(NVCC_FLAGS)
    for architecture in CUDA_ARCHITECTURES:
        flags += ["-gencode", architecture]
    flags += ["-I", str(sources), "-I", str(Path(str(tools.torch)) / "include")]
    if tools.compiler is not None:
        flags += ["-ccbin", tools.compiler]
    return flags


def build(out: Path, work: Path, tools: Tools | None = None, *, cuda: bool = True) -> Result:
    """Build into `out`, with objects and logs in `work`; both are created.

    Raises:
        BuildError: the CPU library could not be built; the CUDA library and the host module are optional.
    """
    tools = tools or find_tools()
    reason = tools.missing()
    if reason is not None:
        raise BuildError(reason)
    sources = source_dir()
    if sources is None:
        raise BuildError("the C++ sources (csrc/) are not there")
    digest = source_hash(sources)
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    result = Result()
    script, targets = _ninja_script(sources, tools, cuda, result)
    (work / "build.ninja").write_text(script)
    # -k 0: a failure in an optional library must not stop the others.
    command = [str(tools.ninja), "-C", str(work), "-k", "0", *targets]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    (work / "build.log").write_text(done.stdout)
    for name in targets:
        if (work / name).is_file():
            _replace(work / name, out / name)
            result.files.append(name)
        else:
            result.failed[name] = f"did not compile; see {work / 'build.log'}"
    if "_C.so" not in result.files:
        raise BuildError(f"compiling failed: {_first_error(done.stdout)}; the whole log: {work / 'build.log'}")
    record = {
        "hash": digest,
        "files": result.files,
        "failed": result.failed,
        "compiler": version_of(tools.compiler),
        "nvcc": version_of(tools.nvcc) if "_C_cuda.so" in result.files else None,
        "flags": list(cxx_flags()),
    }
    # Last: binaries count only with a record that fits them.
    (out / (RECORD + ".new")).write_text(json.dumps(record, indent=1) + "\n")
    (out / (RECORD + ".new")).replace(out / RECORD)
    return result


def _ninja_script(sources: Path, tools: Tools, cuda: bool, result: Result) -> tuple[str, list[str]]:
    torch = Path(str(tools.torch))
    lines = [
        f"cxx = {_quote(str(tools.compiler))}",
        f"flags = {' '.join(cxx_flags())} -I{_quote(str(sources))} -isystem {_quote(str(torch / 'include'))}",
        f"lib = {_quote(str(torch / 'lib'))}",
        "rule cxx\n  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = $cxx $flags -shared -o $out $in $libs",
    ]
    objects = []
    for path in [sources / "ops.cpp", *sorted((sources / "cpu").glob("*.cpp"))]:
        objects.append(f"{path.stem}.o")
        lines.append(f"build {path.stem}.o: cxx {_quote(str(path))}")
    lines += [f"build _C.so: link {' '.join(objects)}", "  libs = -L$lib -ltorch_cpu"]
    targets = ["_C.so"]
    python = Path(sysconfig.get_path("include"))
    if tools.pybind11 is not None and (python / "Python.h").is_file():
        version = " ".join(cxx_flags())
        lines.append(f"build host.o: cxx {_quote(str(sources / 'host.cpp'))}")
        lines.append(
            f"  extra = -isystem {_quote(str(tools.pybind11))} -isystem {_quote(str(python))}"
            f" -DSB_FLAGS='\"{version}\"'"
        )
        lines.append(f"build {HOST}: link host.o")
        targets.append(HOST)
    else:
        result.failed[HOST] = "pybind11 or Python's headers were not found"
    kernels = sorted((sources / "cuda").glob("*.cu"))
    if not (cuda and kernels):
        result.failed["_C_cuda.so"] = "left out: torch here has no CUDA" if kernels else "there are no CUDA sources"
    elif tools.nvcc is None:
        result.failed["_C_cuda.so"] = "no nvcc in $CUDA_HOME, /usr/local/cuda* or on PATH"
    else:
        lines += _cuda_lines(sources, tools, kernels)
        targets.append("_C_cuda.so")
    return "\n".join(lines) + "\n", targets


def _cuda_lines(sources: Path, tools: Tools, kernels: list[Path]) -> list[str]:
    flags = " ".join(_quote(flag) for flag in cuda_flags(tools, sources))
    home = Path(str(tools.nvcc)).resolve().parents[1]
    lines = [
        f"nvcc = {_quote(str(tools.nvcc))}",
        f"rule nvcc\n  command = $nvcc {flags} -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
    ]
    objects = []
    for path in kernels:
        objects.append(f"{path.stem}.cuda.o")
        lines.append(f"build {path.stem}.cuda.o: nvcc {_quote(str(path))}")
    lines.append(f"build _C_cuda.so: link {' '.join(objects)}")
    # libtorch rather than libtorch_cuda: it is there in every torch, and brings the CUDA half along where that exists.
    lines.append(
        f"  libs = -L$lib -Wl,--no-as-needed -ltorch -Wl,--as-needed -L{_quote(str(home / 'lib64'))} "
        f"-L{_quote(str(home / 'lib'))} "
        "-lcudart_static -ldl -lrt -lpthread"
    )
    return lines


def _quote(word: str) -> str:
    return word.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _replace(source: Path, target: Path) -> None:
    # A rename, so that a process which has the old file loaded keeps it whole.
    staged = target.with_name(target.name + ".new")
    shutil.copy2(source, staged)
    staged.replace(target)


def _first_error(log: str) -> str:
    for line in log.splitlines():
        if "error" in line.lower():
            return line.strip()[:300]
    return log.strip().splitlines()[-1][:300] if log.strip() else "no output"


def version_of(program: str | None) -> str | None:
    """What a compiler calls itself; nvcc says so in its last lines but one."""
    if program is None:
        return None
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    release = [line for line in said.splitlines() if "release" in line]
    return (release or said.splitlines() or [""])[0].strip()
