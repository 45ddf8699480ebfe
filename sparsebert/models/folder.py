"""Checks of a model's folder before anything in it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from sparsebert.errors import UserError

__all__ = ["check_folder", "check_safetensors", "first_line"]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_folder(folder: Path) -> None:
    """A `UserError` unless `folder` holds intact safetensors weights, whole or in shards.

    Pickled weights are refused (loading one can run any code), and so are adapters and distributed checkpoints.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder}: holds an adapter; merge it into its base model and save that")
    if any(folder.glob("*.distcp")):
        raise UserError(f"{folder}: holds a distributed checkpoint; save the model with save_pretrained")
    if (folder / WEIGHTS).is_file():
        check_safetensors(folder / WEIGHTS)
        return
    if (folder / INDEX).is_file():
        for shard in _shards(folder / INDEX):
            check_safetensors(shard)
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder}: the weights are a pickle ({pickles[0]}), which is never loaded because it can run code; where "
            "you trust it, convert to safetensors: AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise UserError(f"{folder}: no weights; expected {WEIGHTS}")


def check_safetensors(path: Path) -> None:
    """A `UserError` naming the file unless its header is sound and its length is what the header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as file:
            start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise UserError(f"{path}: a Git LFS pointer, not the file itself; fetch it with: git lfs pull")
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or damaged ({first_line(error)}); fetch it again") from error


def first_line(error: BaseException) -> str:
    """What an error says, cut to one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not a usable index of weights ({first_line(error)})") from error
    shards = []
    for name in sorted(map(str, names)):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: expected names of safetensors files in the same folder, got {name!r}")
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name}: missing, though {index.name} names it")
        shards.append(index.parent / name)
    return shards
