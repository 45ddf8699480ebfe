"""The file of a saved model's masks: one bit a weight, in safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsebert.errors import UserError
from sparsebert.models.folder import first_line
from sparsebert.ops.bits import pack_bits, unpack_bits
from sparsebert.patterns.matrix import Matrix

__all__ = ["MASKS_VERSION", "pack_masks", "read_bits", "read_masks"]

MASKS_VERSION = 1


def pack_masks(masks: Mapping[str, Tensor], pattern: str, fingerprint: str) -> bytes:
    """The masks as the bytes of a safetensors file.

    Each mask is uint8 bits (`sparsebert.ops.bits`) under its matrix's name. The metadata has one key, `sparsebert`:
    JSON with the format's `version`, the sparsity `pattern`, the masks' `shapes`, and the SHA-256 `fingerprint` of
    the base they were saved with.

    Args:
        masks: module name to bool mask, on any device.
        pattern: the sparsity pattern's name.
        fingerprint: `sparsebert.models.load.model_fingerprint` of the pruned base.
    """
    from safetensors.torch import save

    bits = {name: pack_bits(mask.detach().cpu()).contiguous() for name, mask in sorted(masks.items())}
    # One key only: the order of several is not fixed, and equal masks should give equal files.
    about = {
        "version": MASKS_VERSION,
        "pattern": pattern,
        "shapes": {name: list(mask.shape) for name, mask in sorted(masks.items())},
        "fingerprint": fingerprint,
    }
    return save(bits, metadata={"sparsebert": json.dumps(about, sort_keys=True)})


def read_masks(path: Path, known: Mapping[str, Matrix]) -> tuple[dict[str, Tensor], str, str]:
    """As `read_bits`, but with bool masks of the weights' shapes."""
    bits, pattern, fingerprint = read_bits(path, known)
    return {name: unpack_bits(packed, known[name].shape) for name, packed in bits.items()}, pattern, fingerprint


def read_bits(path: Path, known: Mapping[str, Matrix]) -> tuple[dict[str, Tensor], str, str]:
    """The masks of a file, their pattern, and the fingerprint of the base they belong to.

    Args:
        path: the file.
        known: the base's prunable matrices by name.

    Returns:
        Module name to the mask's bits (`sparsebert.ops.bits`), in the order of `known`; pattern; fingerprint.

    Raises:
        UserError: a damaged file, another version, or a mask whose name, dtype, length, padding bits or shape do not
            fit the base; the file and the tensor are named.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            bits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated, damaged or missing ({first_line(error)})") from error
    about = _about(path, metadata)
    shapes = about["shapes"]
    if set(shapes) != set(bits):
        odd = sorted(set(shapes) ^ set(bits))[0]
        raise UserError(f"{path}: {odd!r} is only in one of the file's metadata and its tensors")
    for name in sorted(bits):
        if name not in known:
            raise UserError(f"{path}: {name!r} is no prunable matrix of the base")
        _check_bits(path, known[name], bits[name], shapes[name])
    return {name: bits[name] for name in known if name in bits}, about["pattern"], about["fingerprint"]


def _about(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        about = json.loads(metadata["sparsebert"])
        version = about["version"]
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a file of masks (no metadata of sparsebert in it)") from error
    if version != MASKS_VERSION:
        raise UserError(f"{path}: masks of format version {version!r}; this sparsebert reads {MASKS_VERSION}")
    kinds = {"pattern": str, "fingerprint": str, "shapes": dict}
    for key, kind in kinds.items():
        if not isinstance(about.get(key), kind):
            raise UserError(f"{path}: metadata: expected {key!r} to be {kind.__name__}, got {about.get(key)!r}")
    return dict(about)


def _check_bits(path: Path, matrix: Matrix, bits: Tensor, shape: Any) -> None:
    if shape != list(matrix.shape):
        raise UserError(f"{path}: {matrix.name}: mask of shape {shape}, but the weight is {list(matrix.shape)}")
    entries = matrix.shape[0] * matrix.shape[1]
    length = (entries + 7) // 8
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (length,):
        raise UserError(
            f"{path}: {matrix.name}: expected uint8 [{length}] for {entries} weights, "
            f"got {bits.dtype} {list(bits.shape)}"
        )
    if entries % 8 and int(bits[-1]) >> (entries % 8):
        raise UserError(f"{path}: {matrix.name}: the bits past the last weight are not 0")
