"""Folders of finished runs written by hand, for what is made from results and logs alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from sparsebert.reports.runs import RunRecord


def finished(folder: Path, log: list[dict[str, Any]] | None = None, **changes: Any) -> RunRecord:
    """A run's folder without a model.

    Args:
        folder: made new.
        log: lines of metrics.jsonl.
        changes: of the result.
    """
    folder.mkdir(parents=True)
    result = {
        "method": "tamt",
        "task": "sst2",
        "pattern": "unstructured",
        "metric": "accuracy",
        "score": 0.75,
        "metrics": {"accuracy": 0.75},
        "sparsity": {"target": 0.5, "encoder": 0.5, "model": 0.25, "masked": 0.5},
        "seed": 42,
        "seconds": 3.2,
        "phases": [],
        "model": {"source": "somewhere/bert", "sha256": "ab"},
        "data": {"rows": {"train": 100, "validation": 20}},
        **changes,
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    config = {"run": {"method": result["method"], "task": result["task"]}, "settings": {}, "trainer": {}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    lines = [json.dumps(line) + "\n" for line in log or []]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return RunRecord(folder)
