"""Packages and binaries; everything else is in pyproject.toml.

The compiled libraries are built here where torch's headers are in the environment being installed into. Where they are
not, or there is no compiler, the package installs without and builds them at first use.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def load_build() -> Any:
    """sparsebert/_build.py by its path: importing the package would need what it depends on."""
    spec = importlib.util.spec_from_file_location("_sparsebert_build", ROOT / "sparsebert" / "_build.py")
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{ROOT / 'sparsebert' / '_build.py'} is missing")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def say(message: str) -> None:
    """One line that `pip install -v` shows; pip keeps it to itself otherwise."""
    print(f"sparsebert: {message}", file=sys.stderr)


class BuildBinaries(build_ext):
    """Runs the project's own ninja build instead of one compiler call per extension."""

    def run(self) -> None:
        builder = load_build()
        in_tree = self.inplace or getattr(self, "editable_mode", False)
        self._folder = ROOT / "sparsebert" if in_tree else Path(self.build_lib).resolve() / "sparsebert"
        self._files: list[str] = []
        if not in_tree:
            # A build folder left from an earlier version must not lend its binaries to this wheel.
            for stale in (*self._folder.glob("*.so"), self._folder / builder.RECORD):
                stale.unlink(missing_ok=True)
        try:
            result = builder.build(self._folder, Path(self.build_temp).resolve() / "ninja")
        except builder.BuildError as error:
            say(
                f"installing without compiled kernels: {error}. They are built at first use if they then can be; "
                "`python -m sparsebert.info` says what is there."
            )
            return
        self._files = [*result.files, builder.RECORD]
        for name, reason in result.failed.items():
            say(f"without {name}: {reason}")

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "sparsebert"
        return [str(folder / name) for name in getattr(self, "_files", [])]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()]


setup(
    # The top-level folder kernels/ is installed as sparsebert.kernels, the C++ sources as sparsebert.csrc (they are
    # needed for a build at first use). Never as a top-level `kernels`: that name is Hugging Face's.
    packages=[
        *find_packages(include=["sparsebert", "sparsebert.*"]),
        "sparsebert.kernels",
        "sparsebert.csrc",
        "sparsebert.csrc.cpu",
        "sparsebert.csrc.cuda",
    ],
    package_dir={"sparsebert.kernels": "kernels", "sparsebert.csrc": "csrc"},
    package_data={
        "sparsebert": ["py.typed"],
        "sparsebert.csrc": ["*.cpp", "*.h"],
        "sparsebert.csrc.cpu": ["*.cpp", "*.h", "*.inc"],
        "sparsebert.csrc.cuda": ["*.cu", "*.cuh"],
    },
    # Named so that wheels carry a platform tag; BuildBinaries decides what is compiled.
    ext_modules=[Extension("sparsebert._host", sources=[])],
    cmdclass={"build_ext": BuildBinaries},
)
