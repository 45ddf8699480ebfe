"""The code blocks of Markdown pages, and how tests run them: shared by the README's tests and those of docs/."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sparsebert.data import demo_model_path
from sparsebert.errors import UserError

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"^(?:<!-- ([\w-]+) -->\n)?```(bash|python|cpp)\n(.*?)^```", flags=re.S | re.M)
_FILE = re.compile(r"# (\w+\.py)\n")
# How a line may begin in a shell block: what is none of these, no test would look at.
_KNOWN = r"(torchrun |python3? -m (venv|sparsebert\.\w+)|python tests/sanitize\.py|\. |pip install|pytest|cd )"


@dataclass(frozen=True)
class Snippet:
    """A fenced block of code."""

    name: str
    """From the comment `<!-- name -->` in the line before it; "" where there is none."""
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that the block is the content of, by its first line `# name.py`; None for code to be run."""
        found = _FILE.match(self.text)
        return found[1] if found else None

    @property
    def lines(self) -> list[str]:
        """A shell block's commands, continued lines joined and `&&` taken apart; comments are none."""
        parts = re.split(r"\n|&&", self.text.replace("\\\n", " "))
        return [part.strip() for part in parts if part.strip() and not part.strip().startswith("#")]


def snippets(page: Path) -> list[Snippet]:
    """The shell, Python and C++ blocks of a Markdown page, in order."""
    return [Snippet(*found) for found in _BLOCK.findall(page.read_text(encoding="utf-8"))]


def commands(found: Iterable[Snippet]) -> list[tuple[str, list[str]]]:
    """`(module, arguments)` of each `python -m sparsebert.MODULE ...` in shell blocks."""
    words = [shlex.split(line, comments=True) for block in found if block.language == "bash" for line in block.lines]
    return [(line[2], line[3:]) for line in words if line[:2] == ["python", "-m"] and line[2].startswith("sparsebert.")]


def check_lines(found: Iterable[Snippet]) -> None:
    """Fails on a shell line of a kind that no test knows."""
    for block in found:
        if block.language == "bash":
            for line in block.lines:
                assert re.match(_KNOWN, line), line


def run_command(module: str, arguments: list[str]) -> None:
    """Runs a command in this process; fails unless it ends well."""
    status = importlib.import_module(module).main(arguments)
    assert status == 0, f"python -m {module} {shlex.join(arguments)} ended with status {status}"


def run_python(found: Iterable[Snippet], page: str) -> dict[str, Any]:
    """Runs Python blocks in order in one namespace, as a reader would paste them; a block that is a file is written to
    the working folder instead.

    Returns:
        The namespace.
    """
    namespace: dict[str, Any] = {"__name__": f"snippets of {page}"}
    for block in found:
        if block.language == "python" and block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, page, "exec"), namespace)
    return namespace


def demo_is_missing() -> str | None:
    """Why the demo's packages are not at hand, or None."""
    try:
        demo_model_path()
    except UserError as error:
        return str(error)
    return None


needs_demo = pytest.mark.skipif(demo_is_missing() is not None, reason="the extra sparsebert[demo] is not installed")
