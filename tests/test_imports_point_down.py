"""The order of the rooms: an import points down, never up or sideways. And no file outgrows a reader."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sparsebert"

# From the top. `data` stands beside `models`: below training and methods, and it imports no other room.
ORDER = ("commands", "reports", "training", "methods", "models", "nn", "formats", "patterns", "ops", "kernels")
BESIDE = {"data": "models", "patterns": "formats"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    """The room of a dotted module name: a sub-package, `private` for what all may import, else a command."""
    parts = module.split(".")
    if len(parts) == 1 or parts[1] == "errors" or parts[1].startswith("_"):
        return "private"
    inner = PACKAGE / parts[1]
    return parts[1] if inner.is_dir() or parts[1] == "kernels" else "commands"


def imported(path: Path) -> set[str]:
    """The project's own modules that a file imports, wherever in it."""
    found: set[str] = set()
    package = ("sparsebert", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from sparsebert import _build` names a module too.
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "sparsebert" else {module}
    return {name for name in found if name.split(".")[0] == "sparsebert"}


def may_import(importer: str, other: str) -> bool:
    if other in (importer, "private"):
        return True
    if importer == "private":
        # The package's own __init__ and the build: they look public names up lazily, by string.
        return False
    if importer == "data" or other == "data":
        return (
            other != "data"
            if importer != "data" and ORDER.index(importer) > ORDER.index("models")
            else (importer != "data" and importer != "models")
        )
    if importer not in ORDER or other not in ORDER:
        raise AssertionError(f"a room without a place in the order: {importer} or {other}")
    return ORDER.index(importer) < ORDER.index(other)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    module = ".".join(("sparsebert", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for name in sorted(imported(path)):
        assert may_import(room(module), room(name)), f"{path.relative_to(ROOT)} imports {name}, which is above it"


def test_the_rule_itself() -> None:
    assert may_import("commands", "ops") and may_import("training", "data") and may_import("nn", "ops")
    assert not may_import("ops", "nn") and not may_import("nn", "models") and not may_import("data", "ops")
    assert not may_import("models", "data") and not may_import("ops", "data") and not may_import("private", "ops")
    assert room("sparsebert.ops.bits") == "ops" and room("sparsebert.errors") == room("sparsebert._load") == "private"


def long_files(folder: Path, patterns: tuple[str, ...], limit: int) -> list[str]:
    found = []
    for path in sorted(p for pattern in patterns for p in folder.rglob(pattern)):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > limit:
            found.append(f"{path.relative_to(ROOT)}: {lines} lines, at most {limit}")
    return found


def test_no_file_is_too_long() -> None:
    assert not long_files(PACKAGE, ("*.py",), 400)
    assert not long_files(ROOT / "tests", ("*.py",), 400) + long_files(ROOT / "benchmarks", ("*.py",), 400)
    assert not long_files(ROOT / "kernels", ("*.py",), 600)
    assert not long_files(ROOT / "csrc", ("*.cpp", "*.cu", "*.h", "*.inc"), 600)


def test_no_function_is_too_long() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert lines <= 60, f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {lines} lines, at most 60"
