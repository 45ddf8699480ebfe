"""A linear layer whose weight is stored sparse: made from a pruned one, run, trained under its fixed mask, saved."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsebert.errors import UserError, unknown
from sparsebert.formats import Dense, Format, parse_format
from sparsebert.nn.choose import ROWS, Choice, Timer, choose
from sparsebert.nn.layout import Layout, room_for
from sparsebert.nn.masked import MaskedLinear
from sparsebert.nn.structure import kept_of
from sparsebert.ops._backend import OPS, Op, below_autograd
from sparsebert.ops._linear import ACTIVATIONS, activate, is_supported
from sparsebert.ops.dense_linear import is_amd

__all__ = ["SparseLinear"]

# Below so many rows the op `dense_linear` asks the same library as F.linear, and takes longer to do so.
FEW_ROWS = 4

_layers: weakref.WeakSet[SparseLinear] = weakref.WeakSet()


class SparseLinear(nn.Module):
    """`activation(x @ W^T + bias)` for x `[..., in]`, with W stored in one of `sparsebert.formats`.

    Usually made by `from_linear` or `sparsify`. Made by its constructor it has nothing but zeros (bias too) and waits
    for `load_state_dict`, which takes the format that was saved, whatever it was made with.

    The stored weights, `values`, and the bias are parameters; where the weights lie is in buffers, `layout` among
    them, which says how to read the others. So a state_dict has tensors only, and its indices are validated when it
    is loaded. Training changes stored weights alone: those that are pruned stay so.

    Args:
        in_features, out_features: K and N of the weight `[N, K]`.
        bias: whether there is one, `[N]`.
        format: spelling of the format: "unstructured", "blocks:RxC", "semi_structured:n:m", "compact" or "dense".
        activation: "none", "gelu" (erf's), "gelu_tanh", "relu" or "tanh".
        device, dtype: of the parameters, as for `nn.Linear`.
        trainable: whether the parameters require gradients.

    Raises:
        UserError: a format or activation that is not known, or a format that sizes of this layer do not fit.
    """

    choice: Choice | None
    """Why this format: the measurements that `format="auto"` chose by, else None. Not saved."""
    layout: Tensor
    values: Tensor
    bias: Tensor | None

    def __new__(cls, *args: Any, **kwargs: Any) -> SparseLinear:
        layer = super().__new__(cls)
        _layers.add(layer)
        return layer

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        format: str = "unstructured",
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        if format == "auto":
            raise UserError("format: 'auto' needs a weight to measure; use SparseLinear.from_linear(linear)")
        cls, options = parse_format(format)
        dtype = _checked_dtype(dtype) or torch.get_default_dtype()
        empty = torch.zeros(out_features, in_features, dtype=dtype, device="cpu")
        nothing = torch.zeros(out_features, in_features, dtype=torch.bool, device="cpu")
        stored = cls.from_dense(empty, nothing, **options)
        shift = torch.zeros(out_features, dtype=dtype, device="cpu") if bias else None
        self._setup(stored, shift, activation, trainable)
        self.to(device if device is not None else torch.get_default_device())

    def _setup(self, stored: Format, bias: Tensor | None, activation: str, trainable: bool) -> None:
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        self.out_features, self.in_features = stored.shape
        self.activation = activation
        self.choice = None
        self._transposed: list[Tensor] | None = None
        self._index: tuple[str, ...] = ()
        self.values = nn.Parameter(stored.values, requires_grad=trainable)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=trainable))
        self._describe(Layout.of(stored, activation))
        self._hold({name: tensor for name, tensor in stored.tensors().items() if name != "values"})
        self.register_buffer("layout", self._layout.tensor(stored.device))

    def _describe(self, layout: Layout) -> None:
        """Takes a layout as this layer's own."""
        self._layout = layout
        self._format = layout.format
        self._constants: dict[str, Any] = {**layout.options, "shape": layout.shape, "exact": layout.exact}
        self._dense = layout.format is Dense
        # An op over no weights at all has no compiled body.
        self._op = layout.format.op if min(layout.shape) > 0 else None
        self._pattern = list(layout.options.get("pattern", layout.shape))
        self._few = FEW_ROWS * layout.shape[1]
        self._amd = is_amd()

    def _hold(self, index: Mapping[str, Tensor]) -> None:
        """Takes the index tensors as buffers, in the place of those there are."""
        for name in self._index:
            del self._buffers[name]
        for name, tensor in index.items():
            self.register_buffer(name, tensor)
        self._index = tuple(index)
        self._transposed = None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear | MaskedLinear,
        mask: Tensor | None = None,
        *,
        format: str = "auto",
        activation: str = "none",
        dtype: torch.dtype | None = None,
        rows: Sequence[int] = ROWS,
        trainable: bool = False,
        timer: Timer | None = None,
    ) -> SparseLinear:
        """A sparse layer with the same kept weights and bias, copied.

        Args:
            linear: an `nn.Linear`, or sparsebert's `MaskedLinear`, which has its own mask.
            mask: bool `[N, K]`, True where kept; None: where the weight is not zero.
            format: a format's spelling, or "auto": what was measured to be fastest here, see `choose`.
            activation: applied after the bias.
            dtype: of weight and bias; None: the weight's.
            rows: numbers of rows of x (tokens in a batch) that matter to "auto".
            trainable: whether weights and bias require gradients. A format that stores pruned weights cannot be
                trained, so "auto" leaves those out (and takes the fastest other where dense would be faster).
            timer: measures in `choose`'s place.

        Raises:
            TypeError: not a linear layer, or a weight or mask that is no plain float or bool tensor.
            ValueError: a mask of another shape, a weight without data, or a format that cannot hold the weight.
        """
        if not isinstance(linear, (nn.Linear, MaskedLinear)):
            raise TypeError(f"linear: expected nn.Linear or MaskedLinear, got {type(linear).__name__}")
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        kept = kept_of(linear, mask)
        weight = linear.weight.detach().to(_checked_dtype(dtype) or linear.weight.dtype)
        bias = None if linear.bias is None else linear.bias.detach().to(weight.dtype, copy=True)
        choice = None
        if format == "auto":
            choice = choose(weight, kept, bias=bias, activation=activation, rows=rows, trainable=trainable, timer=timer)
            format = choice.fastest if trainable and not bool(kept.all()) else choice.format
        kind, options = parse_format(format)
        stored = kind.from_dense(weight, kept, **options)
        if trainable and not stored.exact:
            raise UserError(_no_training(format))
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._setup(stored, bias, activation, trainable)
        layer.choice = choice
        layer.train(linear.training)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`, in x's dtype, which is the weight's (autocast aside)."""
        values = self.values
        if (
            self._dense
            and (x.numel() < self._few or self._is_plain(values))
            and (self._layout.exact or not values.requires_grad)
        ):
            y = F.linear(x, values, self.bias)
            return y if self.activation == "none" else activate(y, self.activation)
        bias = self.bias
        if torch.is_grad_enabled() and (
            x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return self._stored().linear(x, bias, self.activation, self._for_gradients(x))
        if (
            self._op is not None
            and x.dtype == values.dtype
            and x.device == values.device
            and x.dim() > 0
            and x.shape[-1] == self.in_features
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled(x.device.type)
        ):
            return self._run(OPS[self._op], x, values, bias)
        return self._stored().linear(x, bias, self.activation)

    def _run(self, op: Op, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """The op itself, past the checks of its public function that hold for every call of this layer.

        They cost as much as the whole product of a single row.
        """
        buffers: dict[str, Any] = self._buffers
        index = [buffers[name] for name in self._index]
        body = op.pick(x.device, is_supported(x.dtype))
        # Nothing is recorded here; left to find that out itself, the registered formula takes some 5 µs.
        with below_autograd():
            if self._dense:
                return body(x, values, bias, self.activation)
            return body(x.contiguous(), values, *index, bias, self._pattern, self.activation, [])

    def _is_plain(self, values: Tensor) -> bool:
        """Whether the op `dense_linear` would only do what F.linear does: it fuses, and has another library on AMD."""
        return self.activation == "none" and not (self._amd and values.dtype == torch.float32)

    def _stored(self) -> Format:
        """The weight in its format, over the parameters and buffers as they are now, unchecked."""
        buffers: dict[str, Any] = self._buffers
        index = {name: buffers[name] for name in self._index}
        return self._format(values=self.values, **index, **self._constants)

    def _for_gradients(self, x: Tensor) -> Sequence[Tensor]:
        """What the backward of x needs, made now if need be."""
        if self.values.requires_grad and not self._layout.exact:
            raise UserError(_no_training(self.format) + ", or freeze the layer with requires_grad_(False)")
        if not x.requires_grad:
            return ()
        if torch.compiler.is_compiling():
            _prepare_while_tracing(self.values)
        elif self._transposed is None:
            self.prepare()
        return () if self._transposed is None else self._transposed

    def prepare(self) -> SparseLinear:
        """Makes what the gradient of x needs (the structure of W^T) now, rather than in the first step; returns self.

        It takes 9 bytes or more a stored weight, and is not saved.
        """
        if self._transposed is None:
            with torch.inference_mode(False), torch.no_grad():
                self._transposed = self._stored().transposed()
        return self

    @property
    def weight(self) -> Tensor:
        """The dense weight `[N, K]`, made anew at each access, which takes far longer than a product."""
        return self.values if self._dense else self._stored().to_dense()

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

    def to_linear(self) -> nn.Linear:
        """An `nn.Linear` with the same weight, zeros in place, and the same bias, both copied.

        Raises:
            UserError: a layer with an activation, which an `nn.Linear` cannot have.
        """
        if self.activation != "none":
            raise UserError(
                f"to_linear: this layer applies {self.activation!r}, which nn.Linear cannot; take its weight and bias"
            )
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight.detach().clone(), requires_grad=self.values.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        dense = self.in_features * self.out_features * self.values.element_size()
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format}, sparsity={self.sparsity:.1%}, bytes={self.nbytes:,} (dense {dense:,}), "
            f"activation={self.activation}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
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
        fresh = SparseLinear(
            self.in_features, self.out_features, False, self.format, self.activation, "cpu", self.values.dtype
        )
        device = self.values.device
        self._describe(fresh._layout)
        self._hold({name: fresh._buffers[name].to(device) for name in fresh._index})  # type: ignore[union-attr]
        self.layout = fresh.layout.to(device)
        self.values = nn.Parameter(fresh.values.detach().to(device), requires_grad=self.values.requires_grad)

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
            # Indices are never taken without what they are checked by.
            wanted = self._layout.format.tensor_names() if layout is None else layout.format.tensor_names()
            known = [*wanted, "layout", *(["bias"] if self.bias is not None else [])]
            missing_keys.extend(prefix + name for name in known if prefix + name not in state_dict)
            unexpected_keys.extend(key for key in own if strict and key.removeprefix(prefix) not in known)
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
        if self.values.shape != stored.values.shape:
            room = torch.zeros(stored.values.shape, dtype=self.values.dtype, device=device)
            self.values = nn.Parameter(room, requires_grad=self.values.requires_grad)
        self.choice = None


def _checked_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UserError(f"dtype: expected a float dtype such as torch.bfloat16, got {dtype}")
    return dtype


def _no_training(format: str) -> str:
    return (
        f"format {format!r}: it stores pruned weights as zeros here, and training would let them grow; choose a "
        "format that stores kept weights only (unstructured, or blocks that fit the mask)"
    )


# The tracer runs this for its effect, and then finds the structure on the layer, which it takes as an input.
@torch.compiler.assume_constant_result
def _prepare_while_tracing(values: Tensor) -> bool:
    """Prepares the layer that holds `values`, and every trainable one beside it, so that one trace serves them all."""
    for layer in list(_layers):
        held = layer._parameters.get("values")
        if held is not None and (held is values or held.requires_grad):
            layer.prepare()
    return True
