"""Real installs with pip into fresh environments: editable and not, with and without Hugging Face's `kernels`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("pip", "setuptools", "pybind11", "ninja")
absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(absent), reason=f"not installed here: {', '.join(absent)}")

# Run from the repository's root with the empty path first, as `python -c` and the shell do.
CHECK = """
import importlib.util, sys
import sparsebert, sparsebert.kernels, sparsebert.kernels.probe
assert sparsebert.kernels.probe.VALUE == 7
from sparsebert import _build
assert _build.source_dir() is not None and (_build.source_dir() / "cpu" / "rows.inc").is_file()
spec = importlib.util.find_spec("kernels")
print("kernels is", "none" if spec is None or spec.origin is None else "Hugging Face's")
if "transformers" in sys.argv:
    import transformers
    transformers.BertModel
    if "Hugging" in sys.argv:
        import kernels
        assert kernels.MARK == "the other package"
print(sparsebert.__file__)
"""


class Environment:
    """A virtual environment that borrows the packages of this one, and a copy of the repository."""

    def __init__(self, folder: Path) -> None:
        self.repository = folder / "repository"
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir(parents=True)
        ignored = shutil.ignore_patterns("*.so", "_binaries.json", "__pycache__", "build", "*.egg-info")
        for name in ("sparsebert", "csrc", "kernels"):
            shutil.copytree(ROOT / name, self.repository / name, ignore=ignored)
        for name in ("pyproject.toml", "setup.py", "MANIFEST.in"):
            shutil.copy(ROOT / name, self.repository / name)
        (self.repository / "kernels" / "probe.py").write_text("VALUE = 7\n")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        self.python = folder / "venv" / "bin" / "python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.packages = folder / "venv" / "lib" / version / "site-packages"
        # A plain path line, not a chained .pth: an editable install of the project here must not leak in.
        (self.packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def install(self, *words: str) -> str:
        """`pip install` the repository without compiling; returns what pip said."""
        command = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(self.python),
            "install",
            "-v",
            "--no-deps",
            "--no-index",
        ]
        command += ["--no-build-isolation", "--disable-pip-version-check", *words, str(self.repository)]
        # Whether binaries come out is test_build's business; a compiler would only cost time here.
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "CXX": "no-such-compiler"}
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def check(self, folder: Path, *words: str) -> tuple[str, Path]:
        """Run CHECK in `folder`; returns what `kernels` is and where the package was found."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(self.python), "-c", CHECK, *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        said, file = done.stdout.splitlines()
        return said, Path(file)

    def add_other_kernels(self) -> None:
        """A stand-in for Hugging Face's package of that name, too old for transformers to use."""
        folder = self.packages / "kernels"
        folder.mkdir()
        (folder / "__init__.py").write_text("MARK = 'the other package'\n__version__ = '0.0.1'\n")


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("editable"))
    assert "installing without compiled kernels: no C++ compiler" in environment.install("-e")
    return environment


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("installed"))
    environment.install()
    return environment


@pytest.mark.parametrize("kind", ["editable", "installed"])
def test_the_package_imports_and_leaves_the_name_kernels_alone(kind: str, request: pytest.FixtureRequest) -> None:
    environment: Environment = request.getfixturevalue(kind)
    source = environment.repository if kind == "editable" else environment.packages
    said, file = environment.check(environment.elsewhere)
    assert said == "kernels is none" and file.is_relative_to(source)
    said, _ = environment.check(environment.repository, "transformers")
    assert said == "kernels is none"
    environment.add_other_kernels()
    said, _ = environment.check(environment.repository, "transformers", "Hugging")
    assert said == "kernels is Hugging Face's"
    said, file = environment.check(environment.elsewhere)
    assert said == "kernels is Hugging Face's" and file.is_relative_to(source)


def test_an_install_carries_the_sources_and_nothing_at_the_top(installed: Environment) -> None:
    inside = installed.packages / "sparsebert"
    for folder in ("csrc", "kernels"):
        shipped = {path.relative_to(inside) for path in (inside / folder).rglob("*") if path.suffix != ".pyc"}
        wanted = (installed.repository / folder).rglob("*")
        files = {path.relative_to(installed.repository) for path in wanted if path.suffix not in (".md", ".pyc")}
        assert files - {Path(folder, "__pycache__")} <= shipped
    assert (inside / "py.typed").is_file()
    assert not (installed.packages / "csrc").exists() and not (installed.packages / "tests").exists()


def test_without_any_install_the_checkout_imports(editable: Environment) -> None:
    environment = {**os.environ, "PYTHONPATH": str(editable.repository)}
    code = "import sparsebert.kernels.probe as probe; print(probe.VALUE)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=editable.elsewhere,
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert done.stdout.strip() == "7"
