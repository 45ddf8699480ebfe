"""Loading a sparse model: built without data, its layers put over the stored tensors; no dense weight is ever made."""

from __future__ import annotations

import hashlib
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsebert.errors import UserError, unknown
from sparsebert.models.folder import WEIGHTS, check_folder, first_line
from sparsebert.models.prunable import LAYOUTS
from sparsebert.models.sparse_build import build, fill
from sparsebert.models.sparse_folder import FORMAT_VERSION, SECTION, save_pretrained
from sparsebert.models.sparse_shown import show_itself
from sparsebert.models.storage import HEAD_FILES, load_head, load_model
from sparsebert.models.task_model import TaskModel
from sparsebert.nn.sparsification import Sparsification
from sparsebert.nn.sparsify import sparsify

__all__ = ["AutoSparseModel"]

_MOST_CONFIG_BYTES = 1 << 26


class AutoSparseModel:
    """Loads what `save_sparse` and `save_pretrained` wrote; not to be instantiated."""

    def __init__(self) -> None:
        raise TypeError("AutoSparseModel is not instantiated; use AutoSparseModel.from_pretrained(directory)")

    @staticmethod
    def from_pretrained(
        directory: str | Path,
        *,
        dtype: torch.dtype | None = None,
        format: str | None = None,
        verify: bool = False,
        attn_implementation: str = "sdpa",
        **options: Any,
    ) -> Any:
        """A sparse model from its folder, in eval mode, on the CPU, of the class that was saved.

        Takes three kinds of folders, and refuses any other:

        - a sparse one (`save_sparse`, or `save_pretrained` of a sparsified model): every layer in the format that it
          was saved in. No dense weight is made; values are mapped from the file and read when they are used;
        - a training run's, or the `model/` in it: its `TaskModel`, the base sparsified now (see `format`), the head as
          it was. On the first load of its kind "auto" takes some seconds, for it measures;
        - a plain checkpoint with uneven widths (`per_layer_config`), as `remove_structure` leaves them: dense.

        The model has two attributes beside what its class has: `sparsification`, a report of its layers, and
        `provenance`, a dict with the sparsity `pattern` and the `base_model` (`name`, `sha256`). In a notebook and
        through rich it shows what its layers are stored in.

        Args:
            directory: the folder; nothing is ever looked up on the network, nothing unpickled, no code in it run.
            dtype: that the weights are moved to (a task head stays in fp32); None: as stored.
            format: for a run: as `sparsify` takes it, None is "auto". A sparse folder has its own.
            verify: whether to compare the SHA-256 of the weights' file, which takes longer than to load it. Without it
                sizes, header, names, shapes and every index are checked, but not the weights' own bits.
            attn_implementation: "sdpa" or "eager".
            options: for a run: what else `sparsify` takes (`rows`, `min_sparsity`, `trainable`, ...).

        Returns:
            The model: of transformers, or a `TaskModel`.

        Raises:
            UserError: a folder that is none of these, or is truncated, damaged, altered or of a newer version; the
                file, and the tensor where there is one, are named.
        """
        folder = _folder(Path(directory).expanduser())
        if attn_implementation not in ("sdpa", "eager"):
            raise unknown("attn_implementation", attn_implementation, ("sdpa", "eager"))
        raw = _read_config(folder)
        model: Any
        if SECTION not in raw and (folder / "masks.safetensors").is_file():
            model = _from_run(folder, format, dtype, options)
        elif SECTION not in raw and "per_layer_config" not in raw:
            raise UserError(
                f"{folder}: not a sparse model's folder (no section {SECTION!r} in its config.json); load it with "
                "transformers and call sparsebert.sparsify, or give the folder of a run"
            )
        elif format is not None or options:
            given = "format" if format is not None else next(iter(options))
            raise UserError(f"{given}: only for a run, which is sparsified when it is loaded; {folder} has its formats")
        else:
            model = _from_sparse(folder, raw, verify, attn_implementation, dtype)
        model.save_pretrained = types.MethodType(save_pretrained, model)
        show_itself(model)
        return model


def _folder(directory: Path) -> Path:
    """The folder with the model: the given one, or a run's `model`."""
    if not directory.is_dir():
        raise UserError(f"directory: expected a folder, got {str(directory)!r}")
    inner = directory / "model"
    if not (directory / "config.json").is_file() and (inner / "config.json").is_file():
        return inner
    return directory


def _from_run(folder: Path, format: str | None, dtype: torch.dtype | None, options: Mapping[str, Any]) -> TaskModel:
    model, _, _, info = load_model(folder)
    # The base alone: the head runs in fp32 whatever the base's dtype is.
    sparsify(model.base, format=format or "auto", dtype=dtype, **options)
    model.sparsification = model.base.sparsification
    origin = {"name": info.get("base_model"), "sha256": info.get("base_sha256")}
    pattern = info.pop("pattern")
    model.provenance = {"pattern": pattern, "base_model": origin, "info": info}  # type: ignore[assignment]
    return model


def _from_sparse(
    folder: Path, raw: dict[str, Any], verify: bool, attn_implementation: str, dtype: torch.dtype | None
) -> nn.Module:
    section = _section(folder, raw)
    check_folder(folder)
    if section is not None:
        _check_files(folder, section, verify)
    tensors = _tensors(folder)
    model = build(folder, raw, tensors, attn_implementation)
    tied = dict(getattr(model, "all_tied_weights_keys", {})) if section is None else section["tied"]
    records = fill(folder / WEIGHTS, model, tensors, tied, None if section is None else section["modules"])
    if dtype is not None:
        model.to(dtype)  # type: ignore[arg-type]
    model.config.dtype = model.dtype
    model.eval()
    whole: Any = model
    provenance: dict[str, Any] = {"pattern": None, "base_model": {"name": None, "sha256": None}}
    if section is not None:
        provenance = {"pattern": section["pattern"], "base_model": section["base_model"]}
        if HEAD_FILES[0] in section["files"]:
            # A head is built with random numbers before it is loaded; those of the caller stay untouched.
            with torch.random.fork_rng(devices=[]):
                whole, provenance["info"] = load_head(folder, model)
    whole.sparsification = Sparsification(records)
    whole.provenance = provenance
    return whole


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json; expected a folder that sparsebert saved a model in")
    if path.stat().st_size > _MOST_CONFIG_BYTES:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes are too many for a configuration")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({first_line(error)})") from error
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise UserError(f"{path}: not a model's configuration (no model_type in it)")
    if not isinstance(raw["model_type"], str) or raw["model_type"] not in LAYOUTS:
        raise UserError(f"{path}: {unknown('model type', str(raw['model_type']), LAYOUTS)}")
    return raw


def _section(folder: Path, raw: dict[str, Any]) -> dict[str, Any] | None:
    """The section of ours, its parts of the right kinds; None where there is none."""
    path = folder / "config.json"
    section = raw.pop(SECTION, None)
    if section is None:
        return None
    version = section.get("format_version") if isinstance(section, dict) else None
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise UserError(
            f"{path}: {SECTION}: format version {version!r}; this sparsebert reads {FORMAT_VERSION}"
            + ("; a newer one may read it" if isinstance(version, int) and version > FORMAT_VERSION else "")
        )
    for key in ("modules", "tied", "files", "base_model"):
        if not isinstance(section.get(key), dict):
            raise UserError(f"{path}: {SECTION}: expected {key!r} to be an object, got {section.get(key)!r}")
    if not all(isinstance(name, str) for name in section["tied"].values()):
        raise UserError(f"{path}: {SECTION}: expected names of tensors in 'tied'")
    known = {WEIGHTS, *HEAD_FILES}
    for name, about in section["files"].items():
        if name not in known or not isinstance(about, dict):
            raise UserError(f"{path}: {SECTION}: unexpected entry {name!r} in 'files'")
    if not {WEIGHTS, *(HEAD_FILES if section["files"].keys() & set(HEAD_FILES) else ())} <= section["files"].keys():
        raise UserError(f"{path}: {SECTION}: 'files' names {sorted(section['files'])}, which is not all of them")
    section.setdefault("pattern", None)
    return section


def _check_files(folder: Path, section: Mapping[str, Any], verify: bool) -> None:
    """Sizes of all files, the header of the weights', and the content of the small ones, or of all."""
    for name, about in section["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing, though config.json names it")
        size = path.stat().st_size
        if size != about.get("bytes"):
            raise UserError(
                f"{path}: {size:,} bytes, but config.json says {about.get('bytes')!r}: truncated or altered"
            )
        with path.open("rb") as file:
            if name == WEIGHTS:
                start = file.read(8)
                header = start + file.read(min(int.from_bytes(start, "little"), size))
                if hashlib.sha256(header).hexdigest() != about.get("header_sha256"):
                    raise UserError(f"{path}: its header is not the one that it was saved with; it was altered")
            file.seek(0)
            if (name != WEIGHTS or verify) and _sha256(file) != about.get("sha256"):
                raise UserError(f"{path}: not the content that it was saved with; it was altered or damaged")


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of the weights' file, mapped from it: what is not looked at is not read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: missing; weights in several files are not read here")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{path}: truncated or damaged ({first_line(error)})") from error
