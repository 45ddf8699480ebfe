"""One op, several bodies: where each is registered and which of them a call gets.

An op `X` lives under one name in up to three `torch.ops` namespaces with the same schema: `sparsebert::X` is the
compiled one (its CPU and CUDA kernels are told apart by torch's dispatcher), `sparsebert_triton::X` the Triton one
(the function `X` of kernels/X.py) and `sparsebert_reference::X` the plain-torch definition. Each carries its own fake
and autograd formulas, so `torch.compile` sees one opaque node whichever is picked.

`SPARSEBERT_BACKEND` set to `cuda`, `triton`, `cpu` or `reference` forces one; a forced one that cannot serve a call is
an error, never a silent fallback.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch._ops import OpOverload

from sparsebert.errors import UserError, unknown

__all__ = [
    "BACKENDS",
    "OPS",
    "REFERENCE",
    "Op",
    "below_autograd",
    "constant_result",
    "failures_raise",
    "forced_backend",
    "is_of_the_kernel",
    "or_else",
]

_F = TypeVar("_F", bound=Callable[..., Any])

BACKENDS = ("cuda", "triton", "cpu", "reference")
_NAMESPACE = {"cuda": "sparsebert", "cpu": "sparsebert", "triton": "sparsebert_triton"}
_DISPATCH_KEY = {"cuda": "CUDA", "triton": "CUDA", "cpu": "CPU"}
_ORDER = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}
REFERENCE = "sparsebert_reference"

# Kept alive for the life of the process: torch drops a registration when its Library object dies.
_reference_library = torch.library.Library(REFERENCE, "DEF")
_triton_library = torch.library.Library(_NAMESPACE["triton"], "DEF")


def forced_backend() -> str | None:
    """The backend named by `SPARSEBERT_BACKEND`, or None; an unknown word is a UserError."""
    word = os.environ.get("SPARSEBERT_BACKEND", "").strip().lower()
    if word and word not in BACKENDS:
        raise unknown("backend in SPARSEBERT_BACKEND", word, BACKENDS)
    return word or None


def constant_result(function: _F) -> _F:
    """Mark a function whose result is a constant of the graph when torch.compile traces it.

    What torch.compiler.assume_constant_result does, which imports the compiler (and Triton with it) for that.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Op:
    """An op's registrations, and the choice among them.

    Args:
        name: the op's name in every namespace.
        reference: the plain-torch body; its annotated signature is the schema.
        fake: shapes and dtypes of the results, for tracing; None where nothing is returned.
        backward, setup_context: the autograd formula (`torch.library.register_autograd`), or None.
        mutates: names of the arguments written in place.
        composed: made of torch's ops and of others here, so it has the one body and no backend to force.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any] | None = None,
        *,
        backward: Callable[..., Any] | None = None,
        setup_context: Callable[..., Any] | None = None,
        mutates: Sequence[str] = (),
        composed: bool = False,
    ) -> None:
        self.name = name
        self.composed = composed
        self._fake = fake
        self._backward = backward
        self._setup_context = setup_context
        self._described: set[str] = set()
        self._picked: dict[tuple[str, bool, str | None], OpOverload] = {}
        self._eager: dict[OpOverload, Callable[..., Any]] = {}
        self._schema = torch.library.infer_schema(reference, mutates_args=tuple(mutates))
        _reference_library.define(name + self._schema)
        _reference_library.impl(name, reference, "CompositeExplicitAutograd")
        OPS[name] = self

    def pick(self, device: torch.device, supported: bool = True) -> OpOverload:
        """The overload that serves tensors on `device`.

        `supported` is False where the compiled bodies do not take these dtypes (float64, for one).
        """
        if torch.compiler.is_compiling():
            # A call traced by torch.compile: only a string can be a constant of the graph.
            return getattr(getattr(torch.ops, _namespace(self.name, device.type, supported)), self.name).default
        return self.choose(device.type, supported)

    def differentiable(self, device: torch.device, supported: bool = True) -> Callable[..., Any]:
        """`pick` with its autograd formula, by the shorter way where nothing is being traced.

        A formula registered with torch.library costs some 50 µs a layer and step more than an autograd.Function; but
        torch.compile is to see the registered one.
        """
        body = self.pick(device, supported)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return body
        if body not in self._eager:
            self._eager[body] = _function(body, self._setup_context, self._backward)
        return self._eager[body]

    def choose(self, device_type: str, supported: bool) -> OpOverload:
        """`pick`, by device type; remembered until `SPARSEBERT_BACKEND` changes."""
        forced = forced_backend()
        key = (device_type, supported, forced)
        if key not in self._picked:
            self._picked[key] = self._resolve(device_type, supported, forced)
        return self._picked[key]

    def missing(self, backend: str) -> str | None:
        """Why `backend` cannot run this op here, or None when it can."""
        if backend == "reference":
            return None
        if self.composed:
            return "made of other ops; has the one body"
        if backend == "triton":
            reason = _triton_missing(self.name, self._schema)
        else:
            from sparsebert import _load

            reason = _load.missing(backend)
        if reason is not None:
            return reason
        qualified = f"{_NAMESPACE[backend]}::{self.name}"
        if not hasattr(getattr(torch.ops, _NAMESPACE[backend]), self.name):
            return "the compiled library does not define this op"
        key = "CPU" if backend == "triton" and _interpreted() else _DISPATCH_KEY[backend]
        if not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key):
            return f"no {backend} kernel for this op"
        return None

    def _resolve(self, device_type: str, supported: bool, forced: str | None) -> OpOverload:
        if forced == "reference" or self.composed:
            return self._overload(REFERENCE)
        candidates = _ORDER.get(device_type, ())
        if forced == "triton" and device_type == "cpu" and _interpreted():
            candidates = ("triton",)
        if forced is not None:
            if forced not in candidates:
                raise UserError(
                    f"SPARSEBERT_BACKEND={forced}: {self.name} was called with tensors on {device_type!r}, which that "
                    f"backend does not serve (candidates: {', '.join((*candidates, 'reference'))})"
                )
            if not supported:
                raise UserError(
                    f"SPARSEBERT_BACKEND={forced}: {self.name} has no {forced} kernel for these dtypes "
                    "(float64 runs on the reference alone, and float16 mostly); unset it or use float32 or bfloat16"
                )
            reason = self.missing(forced)
            if reason is not None:
                raise UserError(f"SPARSEBERT_BACKEND={forced}: {self.name} cannot run on it: {reason}")
            return self._overload(_NAMESPACE[forced])
        if supported:
            for backend in candidates:
                if self.missing(backend) is None:
                    return self._overload(_NAMESPACE[backend])
        return self._overload(REFERENCE)

    def _overload(self, namespace: str) -> OpOverload:
        qualified = f"{namespace}::{self.name}"
        # Fake and autograd must be there before the first call; a compiled op is only defined once its library loads.
        if namespace not in self._described:
            self._described.add(namespace)
            if self._fake is not None:
                torch.library.register_fake(qualified, _on_one_device(self.name, self._fake))
            if self._backward is not None:
                torch.library.register_autograd(qualified, self._backward, setup_context=self._setup_context)
        return getattr(getattr(torch.ops, namespace), self.name).default


OPS: dict[str, Op] = {}


def _on_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """`fake` behind a check of devices: one meta tensor sends a whole call to it, and nobody would fill the result."""

    @functools.wraps(fake)
    def checked(*args: Any) -> Any:
        tensors = [item for arg in args for item in (arg if isinstance(arg, (list, tuple)) else [arg])]
        devices = {str(tensor.device) for tensor in tensors if isinstance(tensor, torch.Tensor)}
        if len(devices) > 1:
            raise ValueError(f"{name}: expected tensors on one device, got {', '.join(sorted(devices))}")
        return fake(*args)

    return checked


def _function(body: OpOverload, setup_context: Any, backward: Any) -> Callable[..., Any]:
    """`body` as an autograd.Function with the formulas that are registered with torch.library too."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with below_autograd():
                output = body(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            # Gradients are recorded here only for a derivative of this derivative (create_graph=True).
            if torch.is_grad_enabled():
                raise NotImplementedError(f"{body}: second derivatives are not supported; drop create_graph=True")
            return backward(ctx, *grads)

    return Eager.apply


# torch.library's own way past a registered formula; no_grad gets there too, a few µs later.
below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", torch.no_grad)


# The choice is a fact of the process, not part of the graph.
@constant_result
def _namespace(name: str, device_type: str, supported: bool) -> str:
    return OPS[name].choose(device_type, supported).namespace


# Calls whose Triton kernel could not be built or launched, by op; and whether such a failure is to be seen.
_failed: dict[str, set[Any]] = {}
_failures_raise = 0


@contextlib.contextmanager
def failures_raise() -> Iterator[None]:
    """Within it a Triton kernel that fails raises, forced or not: to find out whether there is one that runs."""
    global _failures_raise
    _failures_raise += 1
    try:
        yield
    finally:
        _failures_raise -= 1


def or_else(name: str, body: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
    """`body`, and `other` for calls whose Triton kernel could not be built or launched: one warning names it."""

    @functools.wraps(body)
    def run(*args: Any) -> Any:
        if name in _failed and not _must_raise() and _kind(args) in _failed[name]:
            return other(*args)
        try:
            with _on_device_of(args):
                return body(*args)
        except Exception as error:
            if _must_raise() or not is_of_the_kernel(error):
                raise
            if name not in _failed:
                what = (str(error).strip() or type(error).__name__).splitlines()[0]
                warnings.warn(
                    f"{name}: its Triton kernel could not be built or launched ({what}); the slower reference runs in "
                    "its place. SPARSEBERT_BACKEND=triton raises the error instead.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            _failed.setdefault(name, set()).add(_kind(args))
        return other(*args)

    return run


def _on_device_of(args: Sequence[Any]) -> Any:
    """A context in which the GPU that the tensors are on is the current one: Triton launches on that."""
    for arg in args:
        first = arg[0] if isinstance(arg, (list, tuple)) and arg else arg
        if isinstance(first, torch.Tensor):
            return torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext()
    return contextlib.nullcontext()


def _must_raise() -> bool:
    return _failures_raise > 0 or forced_backend() is not None


def is_of_the_kernel(error: Exception) -> bool:
    """Whether an error is a compiler's or a launch's; what the arguments or the memory are to blame for is not."""
    if isinstance(error, (torch.OutOfMemoryError, NotImplementedError, RecursionError)):
        return False
    known = (RuntimeError, OSError, AssertionError, subprocess.SubprocessError)
    return isinstance(error, known) or type(error).__module__.partition(".")[0] == "triton"


def _kind(value: Any) -> Any:
    """What decides which kernel a call launches: shapes, dtypes and constants."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    return tuple(_kind(item) for item in value) if isinstance(value, (tuple, list)) else value


def _interpreted() -> bool:
    """Whether Triton's kernels are to run in its interpreter, on the CPU's tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").strip().lower() in ("1", "true", "on", "yes", "y")


def _triton_missing(name: str, schema: str) -> str | None:
    """Why there is no Triton kernel for op `name` here, or None; defines the op where there is one."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and not _interpreted():
        return "torch sees no CUDA device"
    if importlib.util.find_spec(f"sparsebert.kernels.{name}") is None:
        return "no triton kernel for this op"
    body = getattr(importlib.import_module(f"sparsebert.kernels.{name}"), name)
    if not hasattr(getattr(torch.ops, _NAMESPACE["triton"]), name):
        _triton_library.define(name + schema)
        served = or_else(name, body, getattr(getattr(torch.ops, REFERENCE), name))
        _triton_library.impl(name, served, "CPU" if _interpreted() else "CUDA")
    return None
