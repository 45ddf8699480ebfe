"""What the Triton kernels share: the gaps of the interpreter, and how a kernel is named for compiling without a GPU.

A file `kernels/<op>.py` has a function `<op>` with the signature of the op's reference, which launches its kernels;
`sparsebert.ops._backend` registers it. Beside it stand `specimens()`, every kernel it may launch, for the tests that
compile them for all architectures, and a `cost(...)` that counts what a launch moves and computes.

With `TRITON_INTERPRET=1` set before Triton is imported the kernels run on tensors of the CPU, slowly: to see their
numbers where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs

__all__ = ["INTERPRETED", "Specimen", "dot", "interpreted", "multiprocessors", "triton_type"]


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on tensors of the CPU."""
    return bool(knobs.runtime.interpret)


def _mend_the_interpreter() -> None:
    """Let Triton 3.6's interpreter take a number known at run time for a loop's bound beside numpy >= 2.4."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        # Triton holds a scalar as an array of one entry, which numpy no longer turns into an int by itself.
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if interpreted():
    _mend_the_interpreter()

INTERPRETED = tl.constexpr(interpreted())

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def triton_type(dtype: torch.dtype) -> str:
    """Triton's word for a dtype, as signatures have it; a pointer to it is `"*" + triton_type(dtype)`."""
    return _TYPES[dtype]


@dataclass(frozen=True)
class Specimen:
    """One kernel as it may be launched: enough to compile it without a GPU."""

    label: str
    """What tells it from the others of its op: dtypes, tile sizes."""
    kernel: Any
    """The function under `@triton.jit`."""
    signature: Mapping[str, str | tuple[str, ...]]
    """Each argument that is no constant, in order, to its type: "*bf16", "i32", "fp32"; a tuple's to a tuple."""
    constants: Mapping[str, Any]
    """Name of every `tl.constexpr` argument to its value."""
    warps: int = 4
    stages: int = 3
    least: int = 80
    """The oldest architecture it is launched on (80, 90 or 100)."""
    divisible_by_16: tuple[str, ...] = field(default=())
    """Arguments that are always multiples of 16 (pointers are taken to be): lets loads be wide."""
    most: int = 100
    """The newest architecture it is launched on."""


@triton.jit
def dot(a, b, acc):
    """`acc + a @ b` in float32; float32 operands keep their precision (three tf32 products).

    The interpreter multiplies bfloat16 wrongly, without a word; there the operands are widened first, which changes
    nothing: their products are exact in float32.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="tf32x3")


def multiprocessors(device: torch.device) -> int:
    """How many programs the device runs side by side at least; 4 under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
