"""The model card of an exported run: what it is, how it is run, and only numbers that were measured."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sparsebert.errors import UserError
from sparsebert.models.export import Exported
from sparsebert.models.folder import first_line
from sparsebert.reports.speed_table import markdown
from sparsebert.training.folder import RunFolder

__all__ = ["Card"]

# Where data and results lie on the machine that trained is nobody else's business.
_PRIVATE = ("data_dir", "output", "resume", "config")


class Card:
    """What a run's folder says of its model, read before anything is exported.

    Args:
        folder: the run's. `result.json` and `benchmark.json` may be missing; the card then says so.

    Raises:
        UserError: a file in it that is damaged.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._result = _read_json(folder.result)
        self._settings = _read_settings(folder.config)
        self._speed = self._read_speed(folder.root / "benchmark.json")

    def text(self, exported: Exported, info: Mapping[str, Any], command: str) -> str:
        """The card as Markdown with a YAML head, as the Hugging Face hub reads it.

        Args:
            exported: what was exported.
            info: of `load_model`.
            command: that exported it.
        """
        what = f"It is {exported.what}. Its logits differ from the run's by at most {exported.parity:.1e}."
        sections = [
            self._head(exported, info),
            f"# {info.get('task')}: {info.get('method')}, {self._pruned(info)}",
            f"A subnetwork of {_name(str(info.get('base_model')))} found by sparsebert. {what}",
            f"```python\n{exported.usage}\n```",
            "## Measured",
            self._measured(exported),
            "## Speed",
            self._speed or "Not measured. `python -m sparsebert.benchmark RUN` measures it, on the machine it runs on.",
            "## Made by",
            f"```\npython -m sparsebert.train --config config.yaml\n{command}\n```",
            f"with this as `config.yaml`:\n\n```yaml\n{yaml.safe_dump(self._settings, sort_keys=False)}```",
        ]
        return "\n\n".join(sections) + "\n"

    def _head(self, exported: Exported, info: Mapping[str, Any]) -> str:
        tags = ["sparsebert", "sparse", str(info.get("pattern")), str(info.get("task"))]
        head: dict[str, Any] = {"tags": [*tags, exported.to]}
        base = str(info.get("base_model"))
        if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base) and base != "demo" and not os.path.exists(base):
            head["base_model"] = base
        if self._result:
            head["metrics"] = list(self._result["metrics"])
        return f"---\n{yaml.safe_dump(head, sort_keys=False)}---"

    def _pruned(self, info: Mapping[str, Any]) -> str:
        sparsity = self._result.get("sparsity", {})
        if self._result and self._result["pattern"] is None:
            return "dense"
        share = f" at {sparsity['target']:.1%}" if "target" in sparsity else ""
        return f"{info.get('pattern')}{share}"

    def _measured(self, exported: Exported) -> str:
        if not self._result:
            return "The run was not finished: there is no score."
        result, sparsity = self._result, self._result["sparsity"]
        rows = [(name, f"{value:.4f}") for name, value in result["metrics"].items()]
        untouched = result.get("untouched", {})
        rows += [(f"{name}, unpruned model with a new head", f"{value:.4f}") for name, value in untouched.items()]
        rows += [
            ("pruned, of the whole model", f"{sparsity['model']:.2%} of {sparsity['parameters']:,} parameters"),
            ("pruned, of the encoder", f"{sparsity['encoder']:.2%}"),
            ("examples", f"{result['data']['rows']['validation']} for validation"),
            ("precision", result["precision"]),
            ("seed", f"{result['seed']}: one run, of whose spread over seeds nothing is said here"),
            ("seconds", f"{result['seconds']}"),
            ("hardware", ", ".join(f"{name} {value}" for name, value in result["hardware"].items())),
            ("versions", ", ".join(f"{name} {version}" for name, version in result["versions"].items())),
        ]
        if result.get("note"):
            rows.append(("note", result["note"]))
        score = f"Scores are those of the run's own model in {result['precision']}, on the whole validation set."
        lines = [f"| {name} | {_cell(value)} |" for name, value in rows]
        return "\n".join(["| | |", "|---|---|", *lines]) + f"\n\n{score}"

    def _read_speed(self, path: Path) -> str | None:
        """The tables of `sparsebert.benchmark`, with the hardware they were measured on, one heading deeper."""
        report = _read_json(path)
        if not report:
            return None
        try:
            text = markdown(report)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(f"{path}: not a report of this sparsebert ({error}); measure again or remove it") from error
        return re.sub(r"^## ", "### ", text.partition("\n")[2].strip(), flags=re.MULTILINE)


def _read_json(path: Path) -> dict[str, Any]:
    """What a file holds; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError("it should be a table")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); remove it to export the model all the same") from error
    return found


def _read_settings(path: Path) -> dict[str, Any]:
    """config.yaml without what is only about the machine it was written on."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        run = {name: _name(value) for name, value in settings["run"].items() if name not in _PRIVATE}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: missing or damaged ({first_line(error)}); expected a run's folder") from error
    return {**settings, "run": run}


def _name(value: Any) -> Any:
    """Of paths only the last part; a hub's name, and what else a setting is, as it is."""
    if isinstance(value, list):
        return [_name(item) for item in value]
    return Path(value).name if isinstance(value, str) and (os.path.isabs(value) or os.path.exists(value)) else value


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
