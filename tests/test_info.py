"""`python -m sparsebert.info`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from sparsebert import info
from sparsebert.ops._backend import BACKENDS, OPS


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sparsebert.info", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_json_has_every_op_and_backend() -> None:
    done = run("--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["versions"]["sparsebert"] and found["versions"]["torch"] != "not installed"
    assert set(found["ops"]) == set(OPS)
    for backends in found["ops"].values():
        assert tuple(backends) == BACKENDS and backends["reference"] == "available"
        assert all(said for said in backends.values())


def test_a_pipe_gets_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "─" not in said
    assert all(name in said for name in OPS)


def test_a_terminal_gets_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    assert info.main([]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in OPS) and "reference" in said


def test_reasons_become_footnotes() -> None:
    ops = {"a": {"cuda": "no GPU", "cpu": "available"}, "b": {"cuda": "no GPU", "cpu": "no kernel"}}
    rows, notes = info._op_rows(ops)
    assert rows == [("a", "no (1)", "yes"), ("b", "no (1)", "no (2)")]
    assert notes == ["(1) no GPU", "(2) no kernel"]


def test_a_wrong_backend_is_one_line_and_status_2(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("SPARSEBERT_BACKEND", "cpuu")
    assert info.main(["--json"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: unknown backend in SPARSEBERT_BACKEND 'cpuu'; did you mean")
