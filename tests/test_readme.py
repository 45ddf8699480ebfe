"""Every snippet of the README runs: what installs is run whole by CI, everything else here on a few examples."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from sparsebert.data import demo_model_path
from sparsebert.errors import UserError

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"(?:<!-- ([\w-]+) -->\n)?```(bash|python)\n(.*?)```", README, flags=re.S)
SMALL = ["--max-steps", "3", "--max-train-samples", "64", "--max-eval-samples", "32"]


def commands(module: str) -> list[list[str]]:
    """The arguments of each `python -m MODULE ...` in the README's shell snippets."""
    found = []
    for _, language, text in SNIPPETS:
        if language == "bash":
            for line in re.split(r"\n|&&", text.replace("\\\n", " ")):
                words = shlex.split(line, comments=True)
                if words[:3] == ["python", "-m", module]:
                    found.append(words[3:])
    return found


def demo_is_missing() -> str | None:
    try:
        demo_model_path()
    except UserError as error:
        return str(error)
    return None


needs_demo = pytest.mark.skipif(demo_is_missing() is not None, reason="the extra sparsebert[demo] is not installed")


def test_ci_finds_its_two_commands() -> None:
    named = {name: text for name, language, text in SNIPPETS if language == "bash" and name}
    assert "pip install torch==2.13.0" in named["main-job"]
    assert "python -m sparsebert.train --method adapt_prune" in named["main-job"]
    assert "pip install torch==2.13.0" in named["test-command"]
    assert re.search(r"\bpytest\b", named["test-command"])


def test_every_shell_snippet_is_known() -> None:
    """A line that no test runs does not slip into the README."""
    known = r"(torchrun |python3? -m (venv|sparsebert\.\w+)|python tests/sanitize\.py|\. |pip install|pytest|cd )"
    for _, language, text in SNIPPETS:
        if language == "bash":
            for line in re.split(r"\n|&&", text.replace("\\\n", " ")):
                assert not line.strip() or line.strip().startswith("#") or re.match(known, line.strip()), line


@needs_demo
@pytest.mark.parametrize("arguments", commands("sparsebert.train"), ids=" ".join)
def test_train_commands_run(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsebert.train import main

    if "--data-dir" in arguments or "--resume" in arguments or "--config" in arguments:
        pytest.skip("names files of the reader's own; the same flags are tested in tests/training")
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, *SMALL]) == 0
    assert list(tmp_path.glob("**/result.json"))


@needs_demo
def test_python_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All Python snippets in order, in one namespace, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for _, language, text in SNIPPETS:
        if language == "python":
            exec(compile(text, "README.md", "exec"), namespace)


def test_info_command_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from sparsebert.info import main

    for arguments in commands("sparsebert.info") or [[]]:
        assert main(arguments) == 0
    assert "select_mask" in capsys.readouterr().out
