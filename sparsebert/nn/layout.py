"""How a sparse layer's tensors are to be read, as one small int64 tensor that is saved with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsebert.formats import FORMATS, Format
from sparsebert.ops._linear import ACTIVATIONS
from sparsebert.ops.unstructured_linear import PANEL, STRIP

__all__ = ["Layout", "room_for"]

VERSION = 1
# Positions in these are on disk: add at the end, never reorder.
FORMAT_IDS = ("dense", "unstructured", "blocks", "semi_structured", "compact", "bitmap", "two_four")
ACTIVATION_IDS = ("none", "gelu", "gelu_tanh", "relu", "tanh")
HEAD = 6


@dataclass(frozen=True)
class Layout:
    """Format, options, shape, activation, and whether the format stores kept weights only.

    As a tensor: `[version, format, activation, exact, N, K, ...]`, and two numbers more where the format has a block,
    a pattern, or (unstructured) tiles.
    """

    format: type[Format]
    options: Mapping[str, tuple[int, int]]
    shape: tuple[int, int]
    activation: str
    exact: bool

    @classmethod
    def of(cls, stored: Format, activation: str) -> Layout:
        """The layout of a weight in its format."""
        options = {name: getattr(stored, name) for name in stored.option_names}
        return cls(type(stored), options, stored.shape, activation, stored.exact)

    def tensor(self, device: torch.device) -> Tensor:
        """int64 `[6]` or `[8]`."""
        head = [VERSION, FORMAT_IDS.index(self.format.name), ACTIVATION_IDS.index(self.activation), int(self.exact)]
        tail = [number for pair in self.options.values() for number in pair]
        if self.format.name == "unstructured":
            tail = [STRIP, PANEL]
        return torch.tensor([*head, *self.shape, *tail], dtype=torch.int64, device=device)

    @classmethod
    def read(cls, tensor: Tensor, key: str) -> Layout:
        """The layout that `tensor` describes.

        Raises:
            ValueError: anything that `tensor()` could not have made; it begins with `key`.
        """
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64 or tensor.dim() != 1 or tensor.is_meta:
            raise ValueError(f"{key}: expected an int64 tensor [6] or [8], got {_short(tensor)}")
        numbers = tensor.tolist()
        if numbers[:1] != [VERSION]:
            got = numbers[0] if numbers else "nothing"
            raise ValueError(f"{key}: expected version {VERSION}, got {got}; it may need a newer sparsebert")
        known = len(numbers) >= HEAD and 0 <= numbers[1] < len(FORMAT_IDS) and 0 <= numbers[2] < len(ACTIVATION_IDS)
        if not known or numbers[3] not in (0, 1) or min(numbers[4:6]) < 0:
            raise ValueError(f"{key}: expected [version, format, activation, exact, N, K, ...], got {numbers}")
        kind = FORMATS[FORMAT_IDS[numbers[1]]]
        tail = numbers[HEAD:]
        pairs = 1 if kind.name == "unstructured" else len(kind.option_names)
        if len(tail) != 2 * pairs:
            raise ValueError(f"{key}: expected {HEAD + 2 * pairs} numbers for {kind.name}, got {numbers}")
        if kind.name == "unstructured" and tail != [STRIP, PANEL]:
            raise ValueError(
                f"{key}: expected tiles of {STRIP}x{PANEL}, got {tail[0]}x{tail[1]}: it was saved by another version "
                "of sparsebert; convert it there with to_linear()"
            )
        options = {name: (tail[2 * i], tail[2 * i + 1]) for i, name in enumerate(kind.option_names)}
        return cls(kind, options, (numbers[4], numbers[5]), ACTIVATION_IDS[numbers[2]], bool(numbers[3]))

    def mismatch(self, shape: tuple[int, int], activation: str) -> str | None:
        """Why a layer of `shape` with `activation` cannot take this layout, or None."""
        if self.shape != shape:
            return f"the saved weight is {list(self.shape)}, the layer's {list(shape)}"
        if self.activation != activation:
            return f"the saved layer applies {self.activation!r} after its bias, this one {activation!r}"
        return None

    def check(self, tensors: Mapping[str, Tensor], prefix: str) -> Format:
        """The format over `tensors`, validated.

        Raises:
            ValueError: an index or shape that cannot be; it begins with the key, `prefix` and the tensor's name.
        """
        options: dict[str, Any] = {**self.options, "exact": self.exact}
        try:
            return self.format.from_tensors(tensors, self.shape, options)
        except ValueError as error:
            # What is no tensor's fault (a block that does not divide the shape) is the layout's.
            named = str(error).partition(":")[0] in tensors
            raise ValueError(f"{prefix}{'' if named else 'layout: '}{error}") from error


def _short(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


if set(FORMAT_IDS) != set(FORMATS) or set(ACTIVATION_IDS) != set(ACTIVATIONS):
    raise RuntimeError("every format and activation needs its number in sparsebert/nn/layout.py")


def room_for(held: Tensor | None, tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor that is there where another of the same shape and dtype is to be copied into it, else a copy."""
    if held is not None and (held.shape, held.dtype) == (tensor.shape, tensor.dtype):
        return held
    return tensor.to(device, copy=True)
