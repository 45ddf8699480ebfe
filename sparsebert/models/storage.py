"""Saving a task model as a plain Hugging Face checkpoint with its head and masks beside it, and loading it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsebert.errors import UserError
from sparsebert.models.folder import WEIGHTS, check_safetensors, first_line
from sparsebert.models.load import load_base, state_fingerprint
from sparsebert.models.masks import pack_masks, read_masks
from sparsebert.models.plain import plain_state
from sparsebert.models.prunable import all_matrices, check_mask
from sparsebert.models.replace import out_of_space, previous_of, replace_folder
from sparsebert.models.task_model import TaskModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["HEAD_FILES", "head_files", "load_head", "load_model", "save_model"]

HEAD_VERSION = 1

_HEAD = "head.safetensors"
_ABOUT = "head.json"
_MASKS = "masks.safetensors"
HEAD_FILES = (_HEAD, _ABOUT)
_REPLACED = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "config.json",
        "merges.txt",
        "model.safetensors.index.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
        WEIGHTS,
        _HEAD,
        _ABOUT,
        _MASKS,
    }
)


def save_model(
    directory: Path,
    model: TaskModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    masks: Mapping[str, Tensor],
    pattern: str,
    info: dict[str, Any],
) -> None:
    """Saves a task model whole or not at all.

    The folder is a plain checkpoint of the base, which `AutoModel.from_pretrained` loads: `config.json`,
    `model.safetensors` (pruned weights exactly 0.0) and the tokenizer's files. Beside them lie `head.safetensors` and
    `head.json` (the task head, how it is built, and `info`) and `masks.safetensors` (one bit a weight). An existing
    model is replaced in one step once everything is on disk; other files in its folder are kept.

    Args:
        directory: the folder; made where it does not exist.
        model: its base may hold modules with more state than the plain model; only the plain parameters are saved.
        tokenizer: saved beside the base.
        masks: module name to bool mask of the weight's shape, True where kept; `{}` for a dense model.
        pattern: the sparsity pattern's name.
        info: whatever should be kept with the model, as JSON; `load_model` gives it back.

    Raises:
        ValueError: masks that do not fit the base, or `info` that is not JSON.
        TypeError: `pattern` is no string.
        UserError: the folder cannot be written; a full disk is named with the bytes that are needed.
    """
    directory = Path(directory)
    if not isinstance(pattern, str):
        raise TypeError(f"pattern: expected the name of a sparsity pattern, got {pattern!r}")
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: expected a folder to save the model in, but it is a file")
    files = _files(model, masks, pattern, info)
    config = copy.deepcopy(model.base.config)
    config.architectures = [type(model.base).__name__]
    if model.kind == "classification" and model.label_names:
        config.id2label = dict(enumerate(model.label_names))
        config.label2id = {name: index for index, name in enumerate(model.label_names)}

    def write(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    try:
        replace_folder(directory, write, _REPLACED)
    except Exception as error:  # the tokenizer's library raises bare exceptions for what the system refuses
        if out_of_space(error):
            needed = sum(map(len, files.values()))
            raise UserError(
                f"{directory}: no space left on its disk; the model needs {needed:,} bytes and a little. "
                "Nothing was changed: make room, or give a folder on another disk"
            ) from error
        if isinstance(error, OSError):
            raise UserError(f"{directory}: cannot save the model there ({first_line(error)})") from error
        raise


def load_model(directory: Path) -> tuple[TaskModel, PreTrainedTokenizerBase, dict[str, Tensor], dict[str, Any]]:
    """Loads what `save_model` saved, and checks that its parts belong together. Nothing is unpickled.

    Args:
        directory: the folder.

    Returns:
        The task model in eval mode, on the CPU in fp32; its tokenizer; module name to bool mask (True where kept), in
        the order the matrices run; the saved `info` with `pattern` added.

    Raises:
        UserError: a missing, damaged or altered part, by file and tensor.
    """
    directory = Path(directory)
    if not directory.is_dir():
        previous = previous_of(directory)
        hint = f"; a save was cut off, and the model before it lies in {previous}" if previous.is_dir() else ""
        raise UserError(f"{directory}: no such folder{hint}")
    for name in (_ABOUT, _HEAD, _MASKS):
        if not (directory / name).is_file():
            raise UserError(f"{directory / name}: missing; expected a folder that sparsebert saved a model in")
    about = _read_about(directory / _ABOUT)  # a wrong one is refused before anything large is read
    base, tokenizer = load_base(str(directory))
    known = {matrix.name: matrix for matrix in all_matrices(base)}
    masks, pattern, fingerprint = read_masks(directory / _MASKS, known)
    state = plain_state(base)
    for name, mask in masks.items():
        stray = int((state[f"{name}.weight"][~mask] != 0).sum())
        if stray:
            raise UserError(f"{directory / WEIGHTS}: {name}.weight: {stray} weights that the mask prunes are not 0")
    if state_fingerprint(state) != fingerprint:
        raise UserError(f"{directory / WEIGHTS}: not the weights that {_MASKS} was saved with; save the model again")
    model = _build(directory, base, about)
    return model.eval(), tokenizer, masks, {**about["info"], "pattern": pattern}


def load_head(directory: Path, base: PreTrainedModel) -> tuple[TaskModel, dict[str, Any]]:
    """A task model of `base` and the head that `head_files` describes, and the `info` saved with it.

    Raises:
        UserError: a missing, damaged or altered file, or a head that does not fit the base.
    """
    for name in HEAD_FILES:
        if not (directory / name).is_file():
            raise UserError(f"{directory / name}: missing; expected a folder with a task head that sparsebert saved")
    about = _read_about(directory / _ABOUT)
    return _build(directory, base, about).eval(), dict(about["info"])


def _files(model: TaskModel, masks: Mapping[str, Tensor], pattern: str, info: dict[str, Any]) -> dict[str, bytes]:
    """Name and content of every file but the configuration's and the tokenizer's."""
    from safetensors.torch import save

    state = _pruned_state(model, masks)
    return {
        WEIGHTS: save(state, metadata={"format": "pt"}),
        **head_files(model, info),
        _MASKS: pack_masks(masks, pattern, state_fingerprint(state)),
    }


def head_files(model: TaskModel, info: dict[str, Any]) -> dict[str, bytes]:
    """Name and content of the two files that hold a task head: its tensors, and how it is built with `info`.

    Raises:
        ValueError: `info` is not JSON.
    """
    from safetensors.torch import save

    about = {
        "version": HEAD_VERSION,
        "kind": model.kind,
        "num_labels": model.num_labels,
        "head": model.head_kind,
        "pooling": model.pooling,
        "head_width": model.head_width,
        "label_names": list(model.label_names),
        "info": info,
    }
    try:
        # Python's NaN is let through: a run that diverged should not lose its model over a number in `info`.
        text = json.dumps(about, indent=2, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"info: expected what JSON can hold ({error})") from error
    head = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(model.head.state_dict().items())}
    # Whole files in memory, written by Python: then a full disk is an OSError like any other.
    return {_HEAD: save(head, metadata={"format": "pt"}), _ABOUT: (text + "\n").encode()}


def _pruned_state(model: TaskModel, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base's plain parameters on the CPU, +0.0 where a mask prunes."""
    known = {matrix.name: matrix for matrix in all_matrices(model.base)}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in plain_state(model.base).items()}
    for name, mask in masks.items():
        check_mask(known, name, mask)
        key = f"{name}.weight"
        # A choice, not a product: a NaN or a negative weight must become +0.0 too.
        state[key] = torch.where(mask.detach().cpu(), state[key], torch.zeros((), dtype=state[key].dtype))
    return state


def _read_about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({first_line(error)})") from error
    if not isinstance(about, dict) or about.get("version") != HEAD_VERSION:
        raise UserError(f"{path}: expected a task head of format version {HEAD_VERSION}; save the model again")
    kinds = {
        "kind": str,
        "num_labels": int,
        "head": str,
        "pooling": str,
        "head_width": int,
        "label_names": list,
        "info": dict,
    }
    for key, kind in kinds.items():
        if not isinstance(about.get(key), kind):
            raise UserError(f"{path}: expected {key!r} to be {kind.__name__}, got {about.get(key)!r}")
    return about


def _build(directory: Path, base: Any, about: Mapping[str, Any]) -> TaskModel:
    from safetensors.torch import load_file

    path = directory / _HEAD
    check_safetensors(path)
    tensors = load_file(path)
    # Before anything is built: a wrong number in the description could ask for any amount of memory.
    for name, key in (("dense.weight", "head_width"), ("output.weight", "num_labels")):
        if name in tensors and tensors[name].shape[:1] != (about[key],):
            raise UserError(f"{path}: {name} is {list(tensors[name].shape)}, but {_ABOUT} says {key} {about[key]}")
    names = [str(name) for name in about["label_names"]]
    try:
        model = TaskModel(
            base,
            about["kind"],
            about["num_labels"],
            head=about["head"],
            pooling=about["pooling"],
            head_width=about["head_width"],
            seed=0,
            label_names=names,
        )
    except ValueError as error:
        raise UserError(f"{directory / _ABOUT}: {error}") from error
    expected = model.head.state_dict()
    if set(expected) != set(tensors):
        odd = sorted(set(expected) ^ set(tensors))[0]
        raise UserError(f"{path}: {odd!r} is only in one of the file and the head that {_ABOUT} describes")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            raise UserError(
                f"{path}: {name}: expected {expected[name].dtype} {list(expected[name].shape)}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{path}: {name} holds NaN or infinite numbers")
    model.head.load_state_dict(tensors)
    return model
