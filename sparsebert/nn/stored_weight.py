"""A weight in a storage format as the parameters and buffers of a module: moved, cast, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsebert.formats import Format, parse_format
from sparsebert.nn.layout import Layout, room_for

__all__ = ["StoredWeight"]


class StoredWeight(nn.Module):
    """`values` is a parameter; where they lie is in buffers, `layout` among them, which says how to read the others.

    So a state_dict has tensors only. Loading takes the format that was saved, every index validated.
    """

    layout: Tensor
    values: Tensor
    bias: Tensor | None

    def _setup(self, stored: Format, activation: str, trainable: bool) -> None:
        """Takes a weight, after `nn.Module.__init__`; `activation` is what its layout is to say."""
        self.out_features, self.in_features = stored.shape
        self._index: tuple[str, ...] = ()
        self.values = nn.Parameter(stored.values, requires_grad=trainable)
        self._describe(Layout.of(stored, activation))
        self._hold({name: tensor for name, tensor in stored.tensors().items() if name != "values"})
        self.register_buffer("layout", self._layout.tensor(stored.device))

    def _describe(self, layout: Layout) -> None:
        """Takes a layout as this weight's own."""
        self._layout = layout
        self._format = layout.format
        self._constants: dict[str, Any] = {**layout.options, "shape": layout.shape, "exact": layout.exact}

    def _hold(self, index: Mapping[str, Tensor]) -> None:
        """Takes the index tensors as buffers, in the place of those there are."""
        for name in self._index:
            del self._buffers[name]
        for name, tensor in index.items():
            self.register_buffer(name, tensor)
        self._index = tuple(index)
        self._transposed: list[Tensor] | None = None

    def _stored(self) -> Format:
        """The weight in its format, over the parameters and buffers as they are now, unchecked."""
        buffers: dict[str, Any] = self._buffers
        index = {name: buffers[name] for name in self._index}
        return self._format(values=self.values, **index, **self._constants)

    @property
    def weight(self) -> Tensor:
        """The dense weight `[N, K]`, made anew at each access, which takes far longer than a product.

        Writing to it changes nothing: the weight is in `values`.
        """
        return self._stored().to_dense()

    @property
    def stored(self) -> Tensor:
        """Bool `[N, K]`, True where a weight is stored."""
        return self._stored().stored()

    @property
    def format(self) -> str:
        """Spelling of the format."""
        return self._stored().spelling

    @property
    def exact(self) -> bool:
        """Whether what is stored is exactly what is kept; only then it can be trained."""
        return self._layout.exact

    @property
    def sparsity(self) -> float:
        """Share of the weights that are not stored."""
        return self._stored().sparsity

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weight and of where it lies."""
        return self._stored().nbytes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredWeight:
        """Moves and casts as modules do; but index tensors keep their dtype and content whatever `fn` is.

        `to_empty` and `type` would leave indices in them that the kernels must not read.
        """
        before: dict[str, Tensor] = {name: getattr(self, name) for name in (*self._index, "layout")}
        super()._apply(fn, recurse)
        if before["layout"].is_meta and not self.values.is_meta:
            self._empty()
            return self
        device = self.values.device
        for name, tensor in before.items():
            self._buffers[name] = tensor if tensor.device == device else tensor.to(device)
        if self._transposed is not None:
            self._transposed = [tensor.to(device) for tensor in self._transposed]
        return self

    def _empty(self) -> None:
        """Stores nothing but zeros, in this format: what is left of a layer that had no data."""
        device, activation = self.values.device, self._layout.activation
        fresh = nothing_stored(self.format, (self.out_features, self.in_features), self.values.dtype)
        self._describe(Layout.of(fresh, activation))
        self._hold({name: tensor.to(device) for name, tensor in fresh.tensors().items() if name != "values"})
        self.layout = self._layout.tensor(device)
        self.values = nn.Parameter(fresh.values.to(device), requires_grad=self.values.requires_grad)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes the format that the state was saved in, its indices validated, and then the tensors in torch's way."""
        own = [key for key in state_dict if key.startswith(prefix) and key.count(".") == prefix.count(".")]
        layout, tensors = None, {}
        if f"{prefix}layout" in state_dict:
            layout = Layout.read(state_dict[f"{prefix}layout"], f"{prefix}layout")
            names = layout.format.tensor_names()
            tensors = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
            error = layout.mismatch((self.out_features, self.in_features), self._layout.activation)
            if error is not None:
                error_msgs.append(f"{prefix}layout: {error}")
                return
        if layout is None or len(tensors) < len(layout.format.tensor_names()):
            # Indices are never taken without what they are checked by; what is not taken is named.
            wanted = self._layout.format.tensor_names() if layout is None else layout.format.tensor_names()
            known = [*wanted, "layout", *(["bias"] if self.bias is not None else [])]
            missing_keys.extend(prefix + name for name in known if prefix + name not in state_dict)
            unexpected_keys.extend(own)
            return
        self._adopt(layout, layout.check(tensors, prefix))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _adopt(self, layout: Layout, stored: Format) -> None:
        """Makes room for a checked weight that is about to be copied in; tensors that fit stay the objects they are."""
        device = self.values.device
        self._describe(layout)
        fresh = {name: tensor for name, tensor in stored.tensors().items() if name != "values"}
        held = {name: self._buffers.get(name) for name in fresh}
        self._hold({name: room_for(held[name], tensor, device) for name, tensor in fresh.items()})
        self.layout = room_for(self.layout, layout.tensor(device), device)
        trainable = self.values.requires_grad and layout.exact
        if self.values.shape != stored.values.shape:
            room = torch.zeros(stored.values.shape, dtype=self.values.dtype, device=device)
            self.values = nn.Parameter(room, requires_grad=trainable)
        self.values.requires_grad_(trainable)


def nothing_stored(spelling: str, shape: tuple[int, int], dtype: torch.dtype) -> Format:
    """A weight of zeros on the CPU in the format of that spelling, which stores as little of it as it can.

    Raises:
        ValueError: a format that is not known, or one that the shape does not fit.
    """
    cls, options = parse_format(spelling)
    empty = torch.zeros(shape, dtype=dtype, device="cpu")
    stored = cls.from_dense(empty, torch.zeros(shape, dtype=torch.bool, device="cpu"), **options)
    # Nobody has pruned what some formats store all the same.
    return stored.replaced(exact=True)
