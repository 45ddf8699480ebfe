"""What every storage format of a weight is: tensors, to and from the dense matrix, checked, and a layer over it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Format"]


@dataclass(eq=False, repr=False)
class Format(ABC):
    """A weight `[N, K]` in one storage format.

    Its tensor fields are `values`, the stored weights, which may be an nn.Parameter, and index tensors that say where
    they lie.
    """

    values: Tensor
    """The stored weights, float; the format says in which order and shape."""
    shape: tuple[int, int]
    """`(N, K)`: out_features, in_features."""
    exact: bool = dataclasses.field(default=True, kw_only=True)
    """False where it was made for a mask that prunes some of the stored positions: training would let those grow."""

    name: ClassVar[str]
    """The key in `FORMATS`."""
    op: ClassVar[str | None] = None
    """The op in `ops` that `linear` is one call of; None where it is more than that."""
    option_names: ClassVar[tuple[str, ...]] = ()
    """The fields that are constants of the format's spelling: `block`, `pattern`."""

    @classmethod
    @abstractmethod
    def from_dense(cls, weight: Tensor, mask: Tensor | None = None) -> Self:
        """Store a weight.

        Args:
            weight: `[N, K]`, float, any strides. Kept in its dtype, on its device, and copied.
            mask: bool `[N, K]`, True where a weight is kept; None keeps the weights that are not 0.

        Raises:
            ValueError: a mask or weight that does not fit, or one that this format cannot hold; it says why.
        """

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The weight `[N, K]`, 0 where nothing is stored; differentiable in `values`."""

    @abstractmethod
    def stored(self) -> Tensor:
        """Bool `[N, K]`, True at the positions that have a place in `values`."""

    @abstractmethod
    def check(self) -> None:
        """Validate every tensor, the content of the index tensors included: what the kernels take on trust.

        Raises:
            ValueError: it names the tensor, what was expected and what came.
        """

    @abstractmethod
    def linear(
        self, x: Tensor, bias: Tensor | None = None, activation: str = "none", transposed: Sequence[Tensor] = ()
    ) -> Tensor:
        """`activation(x @ W^T + bias)`, `[..., N]` for x `[..., K]`, by the op of this format.

        `transposed` is what `transposed()` returned; needed where x requires a gradient.
        """

    def transposed(self) -> list[Tensor]:
        """The index tensors that the gradient of x needs, made anew at each call; empty for a format that needs none.

        They depend on the other index tensors and not on `values`.
        """
        return []

    @property
    def options(self) -> dict[str, Any]:
        """What `from_tensors` needs beside tensors and shape; plain bools and tuples of ints."""
        return {**{name: getattr(self, name) for name in self.option_names}, "exact": self.exact}

    @property
    def spelling(self) -> str:
        """As `parse_format` reads it: "blocks:8x2", "semi_structured:2:4", "unstructured"."""
        return self.name

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nnz(self) -> int:
        """Stored positions, whatever is stored there."""
        return self.values.numel()

    @property
    def sparsity(self) -> float:
        """The share of positions that are not stored; 0 for a matrix without any."""
        total = self.shape[0] * self.shape[1]
        return 1 - self.nnz / total if total else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    @classmethod
    def tensor_names(cls) -> tuple[str, ...]:
        """Its tensor fields, `values` first."""
        constants = ("shape", "exact", *cls.option_names)
        return tuple(field.name for field in dataclasses.fields(cls) if field.name not in constants)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by field name, `values` first."""
        return {name: getattr(self, name) for name in self.tensor_names()}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shape: Sequence[int], options: Mapping[str, Any] | None = None
    ) -> Self:
        """The format over given tensors, which are not copied; the inverse of `tensors()`, `shape` and `options`.

        Raises:
            ValueError: as from `check`, or for names that are missing or unknown.
        """
        options = dict(options or {})
        for what, given, wanted, needed in (
            ("tensors", set(tensors), set(cls.tensor_names()), set(cls.tensor_names())),
            ("options", set(options), {*cls.option_names, "exact"}, set(cls.option_names)),
        ):
            if given - wanted or needed - given:
                raise ValueError(f"{what}: {cls.name} expects {sorted(wanted)}, got {sorted(given)}")
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if not is_pair(shape) or min(shape) < 0:
            raise ValueError(f"shape: expected (N, K), got {shape!r}")
        fields: dict[str, Any] = {**tensors, **options, "shape": (int(shape[0]), int(shape[1]))}
        made = cls(**fields)
        made.check()
        return made

    def replaced(self, **tensors: Any) -> Self:
        """A copy with some of its tensors replaced, unchecked: the same structure over other values, for one."""
        return dataclasses.replace(self, **tensors)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """A copy on `device` with values of `dtype`; tensors that need no change are shared."""
        return self.replaced(
            **{
                name: tensor.to(device=device, dtype=dtype if name == "values" else None)
                for name, tensor in self.tensors().items()
            }
        )

    def __repr__(self) -> str:
        n, k = self.shape
        return f"<{self.spelling} [{n}, {k}] {self.dtype}, {self.sparsity:.1%} sparse, {self.nbytes:,} bytes>"


def kept_of(weight: Tensor, mask: Tensor | None) -> Tensor:
    """The mask of what is kept, bool `[N, K]`, from the arguments of `from_dense`, checked."""
    for name, tensor in (("weight", weight), ("mask", mask)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight: expected float [N, K], got {weight.dtype} {list(weight.shape)}")
    if weight.layout != torch.strided or weight.is_meta:
        raise ValueError(f"weight: expected a dense tensor with data, got {weight.layout} on {weight.device}")
    if mask is None:
        return weight != 0
    if mask.layout != torch.strided:
        raise ValueError(f"mask: expected a dense tensor, got {mask.layout}")
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(f"mask: expected bool {list(weight.shape)} like weight, got {mask.dtype} {list(mask.shape)}")
    if mask.device != weight.device:
        raise ValueError(f"mask: expected on {weight.device} like weight, got {mask.device}")
    return mask


def is_pair(value: object) -> bool:
    """Whether `value` is two ints in a row."""
    return isinstance(value, Sequence) and len(value) == 2 and all(isinstance(number, int) for number in value)


def masked(weight: Tensor, kept: Tensor) -> Tensor:
    """The weight with exact zeros where it is not kept, whatever was there."""
    return torch.where(kept, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def check_tensor(
    name: str, tensor: Tensor, dtype: torch.dtype | None, shape: Sequence[int | None], device: torch.device
) -> None:
    """Raise unless a tensor has this dtype (None: a float one), shape (None: any length), device and is contiguous."""
    fits = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
    lengths = tensor.dim() == len(shape) and all(
        wanted in (None, length) for wanted, length in zip(shape, tensor.shape, strict=True)
    )
    if not fits or not lengths:
        spelled = ", ".join("*" if length is None else str(length) for length in shape)
        raise ValueError(f"{name}: expected {dtype or 'float'} [{spelled}], got {tensor.dtype} {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected on {device} like values, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(tensor.stride())}")


def check_content(name: str, good: Tensor, tensor: Tensor, expected: str) -> None:
    """Raise where `good` is not True everywhere, naming the first element of `tensor`, which it is parallel to."""
    if bool(good.all()):
        return
    first = int((~good.reshape(-1)).nonzero()[0])
    raise ValueError(f"{name}: expected {expected}, got {tensor.reshape(-1)[first].item()} at {first}")
