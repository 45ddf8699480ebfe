"""Linear layers to time: every dense path there is for a shape, and the pruned weights to time against them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsebert._openvino import compile_for_cpu
from sparsebert.nn import SparseLinear
from sparsebert.training.hardware import has_native_bf16

SHAPES = ((768, 768), (3072, 768), (768, 3072))
ROWS = (1, 16, 128, 512, 4096)
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)

Call = Callable[[], Any]


def block_mask(shape: tuple[int, int], block: tuple[int, int], sparsity: float) -> Tensor:
    """A random mask [N, K] whose blocks are gone or kept whole, exactly as many gone as the sparsity says."""
    grid = shape[0] // block[0], shape[1] // block[1]
    gone = torch.randperm(grid[0] * grid[1])[: round(sparsity * grid[0] * grid[1])]
    keep = torch.ones(grid[0] * grid[1], dtype=torch.bool)
    keep[gone] = False
    return keep.view(grid).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


def pruned_linear(shape: tuple[int, int], block: tuple[int, int], sparsity: float) -> torch.nn.Linear:
    """An fp32 layer with random weights and bias, pruned; no gradients."""
    linear = torch.nn.Linear(shape[1], shape[0]).requires_grad_(False)
    linear.weight.mul_(block_mask(shape, block, sparsity))
    return linear


def dense_paths(linear: torch.nn.Linear, x: Tensor) -> dict[str, Call]:
    """The dense layer as torch runs it (fp32: MKL, where torch has it), by oneDNN and by OpenVINO, in fp32 and bf16.

    bf16 candidates get their input in bf16, as they would inside a bf16 model; OpenVINO's get and give fp32 and
    compute in the precision named.
    """
    weight, bias = linear.weight, linear.bias
    calls: dict[str, Call] = {"torch fp32": lambda: F.linear(x, weight, bias)}
    if torch.backends.mkldnn.is_available():
        onednn = torch.ops.mkldnn._linear_pointwise
        calls["oneDNN fp32"] = lambda: onednn(x, weight, bias, "none", [], "")
    if has_native_bf16():
        half = [tensor.bfloat16() for tensor in (x, weight, bias)]
        calls["oneDNN bf16"] = lambda: F.linear(*half)
    if importlib.util.find_spec("openvino") is not None:
        for name, precision in (("OpenVINO fp32", "f32"), ("OpenVINO bf16", "bf16")):
            if precision == "f32" or has_native_bf16():
                calls[name] = _openvino(linear, x, precision)
    return calls


def _openvino(linear: torch.nn.Linear, x: Tensor, precision: str) -> Call:
    import openvino as ov
    from openvino import opset13 as op

    entry = op.parameter(list(x.shape), dtype=np.float32)
    product = op.matmul(entry, op.constant(linear.weight.numpy()), False, True)
    model = ov.Model([op.add(product, op.constant(linear.bias.numpy()))], [entry])
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = compile_for_cpu(model, {**options, "PERFORMANCE_HINT": "LATENCY"})
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))
    return request.infer


def repeats(rows: int, of: int) -> int:
    """More rounds where a call is short."""
    return max(of, min(25 * of, of * 1024 // rows))


def check_close(layer: SparseLinear, linear: torch.nn.Linear, x: Tensor) -> None:
    """No speed is reported of a wrong result: within twice torch's own error at this dtype, in fp64."""
    dtype = layer.values.dtype
    rows = x[:64].to(dtype)
    weight, bias = linear.weight.to(dtype), linear.bias.to(dtype)
    exact = F.linear(rows.double(), weight.double(), bias.double())
    own = (F.linear(rows, weight, bias).double() - exact).abs().max()
    error = (layer(rows).double() - exact).abs().max()
    assert error <= 2 * own + 1e-6 * exact.abs().max(), f"wrong result: error {error}, torch's own {own}"
