"""What this machine is, for results, and which precision it trains in."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsebert.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["choose_attention", "compute_dtype", "device", "hardware", "resolve_precision", "versions"]


def device() -> torch.device:
    """Where training runs: the first GPU (this rank's, under torchrun), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _cpu_info() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    info: dict[str, str] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            info.setdefault(key.strip(), value.strip())
    return info


def has_native_bf16(where: torch.device | None = None) -> bool:
    """Whether the device (None: where training runs) multiplies bf16 in hardware; without, bf16 is slower than fp32."""
    where = device() if where is None else where
    if where.type == "cuda":
        return torch.cuda.get_device_capability(where) >= (8, 0)
    return bool({"avx512_bf16", "amx_bf16"} & set(_cpu_info().get("flags", "").split()))


def resolve_precision(asked: str) -> str:
    """`fp32`, `bf16` or `fp16` for what the user asked for (`auto` included).

    Raises:
        UserError: fp16 without a GPU.
    """
    if asked == "auto":
        return "bf16" if has_native_bf16() else "fp32"
    if asked == "fp16" and device().type != "cuda":
        raise UserError("precision fp16: needs a GPU (gradient scaling); use bf16 or fp32 on a CPU")
    return asked


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype that masked weights are multiplied in."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def choose_attention(base: PreTrainedModel, dtype: torch.dtype) -> None:
    """Sets the attention of a base that is fastest where it runs.

    On a CPU torch's fused attention multiplies bf16 without the processor's bf16 instructions: forward and backward of
    12 heads at length 64 took 44 ms fused against 5 ms written out (torch 2.13, Zen 5), at length 384 133 against 50.
    """
    written_out = device().type == "cpu" and dtype == torch.bfloat16
    base.set_attn_implementation("eager" if written_out else "sdpa")


def hardware() -> dict[str, Any]:
    """CPU, cores and GPU, as results name them."""
    info = _cpu_info()
    found: dict[str, Any] = {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native_bf16": has_native_bf16(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(device())
    return found


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("sparsebert", "torch", "transformers", "accelerate", "datasets", "numpy", "scikit-learn", "scipy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
