"""A linear layer whose weight is stored sparse: made from a pruned one, run, trained under its fixed mask, saved."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsebert.errors import UserError, unknown
from sparsebert.formats import Dense, Format, parse_format
from sparsebert.formats.base import check_tensor
from sparsebert.nn.choose import Choice, Timer, choose
from sparsebert.nn.layout import Layout
from sparsebert.nn.masked import MaskedLinear
from sparsebert.nn.stored_weight import StoredWeight, nothing_stored
from sparsebert.nn.structure import check_dtype, kept_of
from sparsebert.ops._backend import OPS, Op, below_autograd, constant_result
from sparsebert.ops._linear import ACTIVATIONS, activate, check_operands, is_supported
from sparsebert.ops.dense_linear import prefers_onednn

__all__ = ["SparseLinear"]

# Below so many rows, and with fewer weights than this, the op `dense_linear` asks the same library as F.linear
# (csrc/cpu/gemm.cpp), and takes longer to do so.
FEW_ROWS = 4
MANY_WEIGHTS = 1 << 20
# Below so many rows it asks cuBLAS on a GPU, as F.linear does (MANY in kernels/dense_linear.py).
GPU_FEW_ROWS = 2048

# Each activation as oneDNN's product is asked for it (csrc/cpu/gemm.cpp).
_ONEDNN: dict[str, tuple[str, list[float], str]] = {
    "none": ("none", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "relu": ("relu", [], ""),
    "tanh": ("tanh", [], ""),
}

_layers: weakref.WeakSet[SparseLinear] = weakref.WeakSet()


class SparseLinear(StoredWeight):
    """`activation(x @ W^T + bias)` for x `[..., in]`, with W stored in one of `sparsebert.formats`.

    Usually made by `from_linear` or `sparsify`. Made by its constructor it has nothing but zeros (bias too) and waits
    for `load_state_dict`, which takes the format that was saved, whatever it was made with.

    The stored weights, `values`, and the bias are parameters; where the weights lie is in buffers, `layout` among
    them, which says how to read the others. So a state_dict has tensors only, and its indices are validated when it
    is loaded. Training changes stored weights alone: those that are pruned stay so. A format that stores some of the
    pruned weights too (`exact` is False) would let them grow: there `values` is frozen.

    Args:
        in_features, out_features: K and N of the weight `[N, K]`.
        bias: whether there is one, `[N]`.
        format: spelling of the format: "unstructured", "bitmap", "two_four", "blocks:RxC", "semi_structured:n:m",
            "compact" or "dense".
        activation: "none", "gelu" (erf's), "gelu_tanh", "relu" or "tanh".
        device, dtype: of the parameters, as for `nn.Linear`.
        trainable: whether the parameters require gradients.

    Raises:
        UserError: a size, format or activation that cannot be. ValueError: a format that the sizes do not fit.
    """

    choice: Choice | None
    """Why this format: the measurements that `format="auto"` chose by, else None. Not saved."""

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
        trainable: bool = True,
    ) -> None:
        super().__init__()
        if format == "auto":
            raise UserError("format: 'auto' needs a weight to measure; use SparseLinear.from_linear(linear)")
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise UserError(f"{name}: expected a number of features, got {size!r}")
        check_dtype(dtype)
        dtype = dtype or torch.get_default_dtype()
        stored = nothing_stored(format, (out_features, in_features), dtype)
        shift = torch.zeros(out_features, dtype=dtype, device="cpu") if bias else None
        self._fill(stored, shift, activation, (trainable, trainable))
        self.to(device if device is not None else torch.get_default_device())

    def _fill(self, stored: Format, bias: Tensor | None, activation: str, trainable: tuple[bool, bool]) -> None:
        """Takes weight and bias; `trainable` is of the one and the other."""
        self.activation = activation
        self._setup(stored, activation, trainable[0])
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=trainable[1]))

    def _describe(self, layout: Layout) -> None:
        super()._describe(layout)
        self.choice = None
        self._dense = layout.format is Dense
        # An op over no weights at all has no compiled body.
        self._op = layout.format.op if min(layout.shape) > 0 else None
        self._pattern = list(layout.options.get("pattern", layout.shape))
        n, k = layout.shape
        self._k = torch.Size((k,))
        self._few = FEW_ROWS * k if n * k < MANY_WEIGHTS else 0
        self._onednn = prefers_onednn()

    @property
    def activation(self) -> str:
        """What follows the bias. It may be set, as `padding_free` does; saved is what the layer was made with."""
        return self._activation

    @activation.setter
    def activation(self, word: str) -> None:
        if word not in ACTIVATIONS:
            raise unknown("activation", word, ACTIVATIONS)
        self._activation = word

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear | MaskedLinear,
        mask: Tensor | None = None,
        *,
        format: str = "auto",
        activation: str = "none",
        dtype: torch.dtype | None = None,
        rows: Sequence[int] | None = None,
        trainable: bool | None = None,
        timer: Timer | None = None,
    ) -> SparseLinear:
        """A sparse layer with the same kept weights and bias, copied. Hooks of `linear` are not taken over.

        Args:
            linear: an `nn.Linear`, or sparsebert's `MaskedLinear`, which has its own mask.
            mask: bool `[N, K]`, True where kept; None: where the weight is not zero.
            format: a format's spelling, or "auto": what was measured to be fastest here, see `choose`.
            activation: applied after the bias.
            dtype: of weight and bias; None: the weight's.
            rows: numbers of rows of x (tokens in a batch) that matter to "auto"; None: the defaults of `choose`.
            trainable: whether weight and bias require gradients. None: where those of `linear` do; but a weight in
                a format that stores pruned ones too is frozen, which `repr` then says. True: such a format is
                refused, and "auto" measures forward and backward, among the others alone, of which it takes the
                fastest where dense would be faster.
            timer: measures in `choose`'s place.

        Raises:
            TypeError: not a linear layer, or a weight or mask that is no plain float or bool tensor.
            ValueError: a mask of another shape, a weight without data, or a format that cannot hold the weight.
        """
        if isinstance(linear, SparseLinear):
            raise TypeError("linear: expected nn.Linear or MaskedLinear, got a SparseLinear; give its to_linear()")
        if not isinstance(linear, (nn.Linear, MaskedLinear)):
            raise TypeError(f"linear: expected nn.Linear or MaskedLinear, got {type(linear).__name__}")
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        check_dtype(dtype)
        given, kept = linear.weight, kept_of(linear, mask)
        weight = given.detach().to(dtype or given.dtype)
        bias = None if linear.bias is None else linear.bias.detach().to(weight.dtype, copy=True)
        choice, train = None, bool(trainable)
        if format == "auto":
            choice = choose(weight, kept, bias=bias, activation=activation, rows=rows, trainable=train, timer=timer)
            format = choice.fastest if train and not bool(kept.all()) else choice.format
        kind, options = parse_format(format)
        stored = kind.from_dense(weight, kept, **options)
        if train and not stored.exact:
            raise UserError(_no_training(format))
        grads = (train, train)
        if trainable is None:
            grads = (given.requires_grad and stored.exact, linear.bias is not None and linear.bias.requires_grad)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._fill(stored, bias, activation, grads)
        layer.choice = choice
        layer.train(linear.training)
        return layer

    @classmethod
    def from_stored(
        cls, stored: Format, bias: Tensor | None = None, *, activation: str = "none", trainable: bool = False
    ) -> SparseLinear:
        """A sparse layer over a weight that is in its format already; nothing is copied, and no dense weight is made.

        Args:
            stored: the weight, as `Format.from_tensors` or `from_dense` made it, which have checked it.
            bias: `[N]` in the weight's dtype, on its device; None: there is none.
            activation: applied after the bias.
            trainable: whether the parameters require gradients; a weight that stores pruned ones too never does.

        Raises:
            ValueError: a bias of another shape, dtype or device.
        """
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        if bias is not None:
            check_tensor("bias", bias, stored.dtype, [stored.shape[0]], stored.device)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._fill(stored, bias, activation, (trainable and stored.exact, trainable))
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`, in x's dtype, which is the weight's (autocast aside)."""
        values, bias = self.values, self.bias
        recorded = torch.is_grad_enabled() and (
            x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
        )
        if self._dense and (self._layout.exact or not values.requires_grad):
            y = self._run_dense(x, values, bias, recorded)
            if y is not None:
                return y
        if recorded:
            if torch.compiler.is_exporting():
                # What is exported is for inference, and has no place to prepare in.
                with torch.no_grad():
                    return self._stored().linear(x, bias, self._activation)
            return self._stored().linear(x, bias, self._activation, self._for_gradients(x))
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
        return self._stored().linear(x, bias, self._activation)

    def _run_dense(self, x: Tensor, values: Tensor, bias: Tensor | None, recorded: bool) -> Tensor | None:
        """What the op `dense_linear` would ask for, without the way to it, some 8 of the 80 µs that 16 rows take.

        None where that is not as simple as one call.
        """
        onednn = self._onednn and values.dtype is torch.float32 and values.is_cpu
        few = GPU_FEW_ROWS * self.in_features if values.is_cuda else self._few
        if x.numel() < few or not (onednn or self._activation != "none"):
            try:
                return activate(F.linear(x, values, bias), self._activation)
            except RuntimeError:
                check_operands(x, values, bias, self.out_features, self.in_features)
                raise
        if (
            onednn
            and not recorded
            and x.dtype is torch.float32
            and x.is_cpu
            and x.shape[-1:] == self._k
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
        ):
            shift = bias if bias is None or bias.is_contiguous() else bias.contiguous()
            return torch.ops.mkldnn._linear_pointwise(x, values, shift, *_ONEDNN[self._activation])
        return None

    def _run(self, op: Op, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """The op itself, past the checks of its public function that hold for every call of this layer.

        They cost as much as the whole product of a single row.
        """
        buffers: dict[str, Any] = self._buffers
        index = [buffers[name] for name in self._index]
        body = op.pick(x.device, is_supported(x.dtype, x.device.type))
        # Nothing is recorded here; left to find that out itself, the registered formula takes some 5 µs.
        with below_autograd():
            if self._dense:
                return body(x, values, bias, self._activation)
            return body(x.contiguous(), values, *index, bias, self._pattern, self._activation, [])

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
            f"activation={self.activation}" + ("" if self.exact else ", frozen: pruned weights are stored too")
        )


def _no_training(format: str) -> str:
    return (
        f"format {format!r}: it stores pruned weights as zeros here, and training would let them grow; choose a "
        "format that stores kept weights only (unstructured, or blocks that fit the mask)"
    )


# The tracer runs this for its effect, and then finds the structure on the layer, which it takes as an input.
@constant_result
def _prepare_while_tracing(values: Tensor) -> bool:
    """Prepares the layer that holds `values`, and every trainable one beside it, so that one trace serves them all."""
    for layer in list(_layers):
        held = layer._parameters.get("values")
        if held is not None and (held is values or held.requires_grad):
            layer.prepare()
    return True
