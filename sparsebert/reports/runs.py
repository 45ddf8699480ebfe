"""Finished runs as reports and notebooks see them: what their folders hold, read when it is asked for."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from sparsebert.errors import UserError
from sparsebert.models.folder import first_line
from sparsebert.models.masks import read_masks
from sparsebert.models.per_layer import build_uneven
from sparsebert.models.prunable import all_matrices
from sparsebert.patterns import Matrix
from sparsebert.training.folder import RunFolder

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["RunRecord", "find_runs", "read_run", "read_runs"]

_KEYS = {"method": str, "task": str, "metric": str, "score": float, "sparsity": dict, "seed": int}


class RunRecord:
    """A finished run. Masks, log and reports are read when they are first asked for.

    Args:
        folder: the run's.
        label: what tables and plots call it; the folder's name where none is given.

    Raises:
        UserError: no finished run, or a damaged part of one.
    """

    def __init__(self, folder: str | Path, label: str | None = None) -> None:
        self.files = RunFolder(Path(folder).expanduser())
        self.folder: Path = self.files.root
        self.label: str = label or self.folder.resolve().name
        if not self.files.result.is_file():
            raise UserError(_no_run(self.files))
        self.result: dict[str, Any] = _json(self.files.result)
        for key, kind in _KEYS.items():
            found = self.result.get(key)
            if not isinstance(found, (kind, int) if kind is float else kind):
                raise UserError(f"{self.files.result}: expected {key!r} to be {kind.__name__}, got {found!r}")
        self.config: dict[str, Any] = _yaml(self.files.config)

    @property
    def pruned(self) -> bool:
        """Whether its method prunes."""
        return self.result.get("pattern") is not None

    @property
    def base(self) -> str:
        """SHA-256 of the pre-trained model that it began with; "" in a result that does not say."""
        return str(self.result.get("model", {}).get("sha256", ""))

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        """Every prunable matrix of its model by module name, in the order they run; no weight is read."""
        from transformers import MODEL_MAPPING, AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.files.model)
            with torch.device("meta"):
                kind: Any = MODEL_MAPPING[type(config)]
                base = build_uneven(kind, config)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{self.files.model}: no model of a run ({first_line(error)})") from error
        return {matrix.name: matrix for matrix in all_matrices(base)}

    def masks(self) -> dict[str, Tensor]:
        """Module name to bool mask of the weight's shape, True where kept, in the order the matrices run; `{}` for a
        dense run. Shared by all who ask: not to be changed."""
        return self._masks

    @cached_property
    def _masks(self) -> dict[str, Tensor]:
        path = self.files.model / "masks.safetensors"
        if not path.is_file():
            raise UserError(f"{path}: missing; expected the folder of a finished run")
        return read_masks(path, self.matrices)[0]

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; empty where there is none. A line that cannot be read is left out."""
        entries: list[dict[str, Any]] = []
        if self.files.metrics.is_file():
            for line in self.files.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                if isinstance(entry, dict):
                    entries.append(entry)
        return entries

    @cached_property
    def benchmark(self) -> dict[str, Any] | None:
        """What `sparsebert.benchmark` measured; None where it has not."""
        path = self.folder / "benchmark.json"
        return _json(path) if path.is_file() else None

    @cached_property
    def analysis(self) -> dict[str, Any] | None:
        """What `sparsebert.analyze` found and wrote into the run's folder; None where it has not."""
        path = self.folder / "analysis.json"
        return _json(path) if path.is_file() else None

    def rows(self) -> list[tuple[str, str]]:
        """What a glance at the run shows: name and value."""
        result, sparsity = self.result, self.result["sparsity"]
        target = f", {result['pattern']}, target {sparsity.get('target', 0.0):.1%}" if self.pruned else ", dense"
        rows = [
            ("method", f"{result['method']}{target}"),
            ("task", str(result["task"])),
            (str(result["metric"]), f"{result['score']:.4f}"),
        ]
        if self.pruned and "encoder" in sparsity:
            rows.append(("sparsity", f"{sparsity['encoder']:.2%} of the encoder, {sparsity['model']:.2%} of the model"))
        rows.append(("seed", str(result["seed"])))
        source = result.get("model", {}).get("source")
        rows += [("model", Path(str(source)).name)] if source else []
        rows += [("time", f"{result['seconds']:.0f} s")] if isinstance(result.get("seconds"), (int, float)) else []
        return rows

    def __repr__(self) -> str:
        return f"RunRecord({self.label!r}: " + ", ".join(f"{name} {value}" for name, value in self.rows()) + ")"

    def __rich__(self) -> Table:
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=escape(self.label), show_header=False)
        for name, value in self.rows():
            table.add_row(escape(name), escape(value))
        return table

    def _repr_html_(self) -> str:
        body = "".join(
            f'<tr><th scope="row" style="text-align:left">{html.escape(name)}</th>'
            f'<td style="text-align:left">{html.escape(value)}</td></tr>'
            for name, value in self.rows()
        )
        return f"<table><caption>{html.escape(self.label)}</caption><tbody>{body}</tbody></table>"


def read_run(path: str | Path) -> RunRecord:
    """A finished run.

    Raises:
        UserError: no finished run there, or a damaged part of one.
    """
    return RunRecord(path)


def find_runs(path: str | Path) -> list[Path]:
    """The folders of the finished runs that `path` names: itself, or else every folder below it with a result.json.

    Raises:
        UserError: none there.
    """
    root = Path(path).expanduser()
    if (root / "result.json").is_file():
        return [root]
    if root.is_dir() and not (root / "config.yaml").is_file():
        found = sorted(file.parent for file in root.rglob("result.json") if (file.parent / "config.yaml").is_file())
        if found:
            return found
    raise UserError(_no_run(RunFolder(root)))


def read_runs(paths: Iterable[str | Path], *, expand: bool = True) -> list[RunRecord]:
    """Finished runs in the order given, each once, with labels that differ.

    Args:
        paths: folders of runs.
        expand: whether a folder of runs stands for all runs below it.

    Raises:
        UserError: as `find_runs` and `read_run`.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        for folder in find_runs(path) if expand else [Path(path)]:
            folders.setdefault(folder.expanduser().resolve(), folder)
    runs = [RunRecord(folder) for folder in folders.values()]
    parts = [folder.parts for folder in folders]
    for run, own in zip(runs, parts, strict=True):
        # As many of the last folders' names as it takes to tell it from every other run.
        length = next(n for n in range(1, len(own) + 1) if sum(other[-n:] == own[-n:] for other in parts) == 1)
        run.label = "/".join(own[-length:])
    return runs


def _no_run(files: RunFolder) -> str:
    if not files.root.exists():
        return f"{files.root}: no such folder"
    if files.config.is_file():
        again = f"python -m sparsebert.train --resume {files.root}"
        return f"{files.root}: the run is not finished (no {files.result.name}); go on with:  {again}"
    return f"{files.root}: holds no finished run (no {files.result.name} there)"


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({first_line(error)}); remove it, or run again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, as sparsebert writes it")
    return content


def _yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: missing or damaged ({first_line(error)}); expected a run's folder") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("run", "trainer")):
        raise UserError(f"{path}: expected a run's settings, with the sections run, settings and trainer")
    return content
