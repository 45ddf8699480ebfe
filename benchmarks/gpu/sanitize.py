"""Calls every op's GPU kernels once, at small ragged shapes, forward and backward: for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python -m benchmarks.gpu.sanitize [OP ...]

An op without a kernel for the GPU is named and left out, and so is one that has no call here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cell import Skip, first_line
from benchmarks.gpu.cells_ffn import call_of
from benchmarks.gpu.worker import BROKEN
from sparsebert import ops
from sparsebert.formats import parse_format
from sparsebert.ops._backend import OPS, failures_raise

__all__ = ["CALLS", "run"]

Call = Callable[[torch.device, torch.dtype], Any]
DTYPES = (torch.bfloat16, torch.float32)


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def _backward(loss: Tensor) -> Tensor:
    loss.float().sum().backward()
    return loss


def _stored(spelling: str, shape: tuple[int, int], rows: int) -> Call:
    def call(device: torch.device, dtype: torch.dtype) -> Tensor:
        kind, options = parse_format(spelling)
        side = options.get("block", (1, 1))
        keep = torch.rand(shape[0] // side[0], shape[1] // side[1], device=device) < 0.5
        mask = keep.repeat_interleave(side[0], 0).repeat_interleave(side[1], 1)
        if "pattern" in options:
            mask = torch.arange(shape[1], device=device).expand(shape) % 4 < 2
        stored = kind.from_dense(torch.randn(shape, device=device).to(dtype), mask, **options)
        x, bias = _random(device, dtype, rows, shape[1]), _random(device, dtype, shape[0])
        with torch.no_grad():
            stored.linear(x, bias, "gelu")
        return _backward(stored.linear(x, bias, "none", stored.transposed()))

    return call


def _select(device: torch.device, dtype: torch.dtype) -> Any:
    scores = [torch.randn(33, 40, device=device).round(decimals=1), torch.randn(17, 24, device=device)]
    weights = [torch.randn_like(score) for score in scores]
    out = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    ops.threshold_mask(scores, 0.1, weights, out)
    return ops.select_mask(scores, 700, weights, out), out


def _masked(device: torch.device, dtype: torch.dtype) -> Tensor:
    x, weight, scores, bias = (_random(device, torch.float32, *s) for s in ((37, 40), (24, 40), (24, 40), (24,)))
    masked = torch.empty(24, 40, device=device, dtype=dtype)
    bits = ops.select_mask([scores.detach()], 400, [weight.detach()], [masked])[0]
    return _backward(ops.masked_linear(x.detach().to(dtype).requires_grad_(), weight, masked, scores, bits, bias))


def _masked_weight(device: torch.device, dtype: torch.dtype) -> Tensor:
    bits = torch.randint(0, 256, (165,), device=device, dtype=torch.uint8)
    return ops.masked_weight(torch.randn(33, 40, device=device), bits, dtype=dtype)


def _maps(op: Callable[..., Tensor], tensors: int, **options: Any) -> Call:
    def call(device: torch.device, dtype: torch.dtype) -> Tensor:
        student = [_random(device, dtype, 2, 2, 21, 16) for _ in range(tensors)]
        teacher = [_random(device, dtype, 2, 2, 21, 24).detach() for _ in range(tensors)]
        mask = torch.arange(21, device=device) < torch.tensor([[21], [9]], device=device)
        return _backward(op(*student, *teacher, mask, **options))

    return call


def _hidden(op: Callable[..., Tensor]) -> Call:
    def call(device: torch.device, dtype: torch.dtype) -> Tensor:
        student, teacher = ([_random(device, dtype, 2, 7, 40) for _ in range(3)] for _ in range(2))
        mask = torch.arange(7, device=device) < torch.tensor([[7], [3]], device=device)
        return _backward(op(student, [t.detach() for t in teacher], mask))

    return call


def _logits(device: torch.device, dtype: torch.dtype) -> Tensor:
    for classes in (3, 1000):
        pair = [_random(device, dtype, 37, classes) for _ in range(2)]
        loss = _backward(ops.soft_cross_entropy(pair[0], pair[1].detach(), temperature=2.0))
    return loss


def _head(device: torch.device, dtype: torch.dtype) -> Tensor:
    sides = [_random(device, dtype, *shape) for shape in ((37, 32), (300, 32), (37, 48), (300, 48))]
    op = ops.linear_soft_cross_entropy  # type: ignore[attr-defined]
    return _backward(op(*sides[:2], *(t.detach() for t in sides[2:]), temperature=2.0))


def _attention(device: torch.device, dtype: torch.dtype) -> Tensor:
    keep = torch.rand(1, 2, 3, 3, device=device) < 0.6
    mask = keep.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, :45, :45]
    lists = ops.BlockLists.from_mask(mask & (torch.rand(1, 2, 45, 45, device=device) > 0.1), (16, 16))
    q, k, v = (_random(device, dtype, 2, 2, 45, 32) for _ in range(3))
    key_mask = torch.arange(45, device=device) < torch.tensor([[45], [20]], device=device)
    result = ops.block_sparse_attention(q, k, v, lists, key_mask=key_mask)
    return _backward(result)  # type: ignore[arg-type]


def _varlen(device: torch.device, dtype: torch.dtype) -> Tensor:
    q, k, v = (_random(device, dtype, 44, 2, 32) for _ in range(3))
    starts = torch.tensor([0, 21, 21, 44], device=device)
    return _backward(ops.varlen_attention(q, k, v, starts))


def _norm(device: torch.device, dtype: torch.dtype) -> Tensor:
    parts = [_random(device, dtype, *shape) for shape in ((13, 40), (13, 40), (40,), (40,))]
    return _backward(ops.add_layer_norm(*parts))


def _packed(device: torch.device, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32:
        dtype = torch.bfloat16
    kind, options = parse_format("semi_structured:2:4")
    kept = torch.rand(264, 34, 4, device=device).argsort(2).view(264, 136) < 2
    stored: Any = kind.from_dense(torch.randn(264, 136, device=device).to(dtype), kept, **options)
    packed = ops.semi_structured_pack(stored.values, stored.positions)
    x = torch.randn(300, 136, device=device).to(dtype)
    return ops.semi_structured_packed_linear(x, packed, shape=(264, 136), activation="gelu")


def _clusters(device: torch.device, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32:
        dtype = torch.bfloat16
    kind, options = parse_format("blocks:64x64")
    kept = (torch.rand(6, 3, device=device) < 0.5).repeat_interleave(64, 0).repeat_interleave(64, 1)
    stored: Any = kind.from_dense(torch.randn(384, 192, device=device).to(dtype), kept, **options)
    x = torch.randn(300, 192, device=device).to(dtype)
    return ops.block_cluster_linear(
        x, stored.values, stored.columns, stored.row_starts, shape=(384, 192), activation="gelu"
    )


def _dense(device: torch.device, dtype: torch.dtype) -> Tensor:
    parts = [_random(device, dtype, *shape) for shape in ((13, 40), (24, 40), (24,))]
    return _backward(ops.dense_linear(*parts))


def _fused(device: torch.device, dtype: torch.dtype) -> Any:
    kind, options = parse_format("blocks:16x16")
    sides = {}
    for side, shape in (("up", (64, 32)), ("down", (32, 64))):
        weight = torch.randn(shape, device=device).to(dtype)
        weight[:16, :16] = 0
        sides[side] = SimpleNamespace(stored=kind.from_dense(weight, **options), bias=weight[:, 0].clone())
    s = SimpleNamespace(x=torch.randn(21, 32, device=device).to(dtype), **sides)
    return call_of(s)(s)


CALLS: dict[str, Call] = {
    "select_mask": _select,
    "threshold_mask": _select,
    "masked_weight": _masked_weight,
    "masked_linear": _masked,
    "masked_linear_backward": _masked,
    "split_weight_grad": _masked,
    "nm_mask": lambda device, dtype: ops.nm_mask(torch.randn(17, 24, device=device), 2, 4),
    "block_cluster_linear": _clusters,
    "block_sparse_linear": _stored("blocks:16x16", (48, 64), 37),
    "block_sparse_sddmm": _stored("blocks:32x32", (96, 64), 70),
    "block_sparse_ffn": _fused,
    "semi_structured_linear": _stored("semi_structured:2:4", (48, 64), 37),
    "semi_structured_pack": _packed,
    "semi_structured_packed_linear": _packed,
    "two_four_linear": _stored("two_four", (48, 64), 37),
    "unstructured_linear": _stored("unstructured", (24, 40), 37),
    "unstructured_sddmm": _stored("unstructured", (24, 40), 37),
    "bitmap_linear": _stored("bitmap", (48, 64), 37),
    "dense_linear": _dense,
    "add_layer_norm": _norm,
    "varlen_attention": _varlen,
    "varlen_attention_backward": _varlen,
    "block_lists": _attention,
    "block_order": _attention,
    "transposed_block_lists": _attention,
    "block_sparse_attention": _attention,
    "block_sparse_attention_backward": _attention,
    "soft_cross_entropy": _logits,
    "linear_soft_cross_entropy": _head,
    "hidden_mse": _hidden(ops.hidden_mse),
    "hidden_cosine": _hidden(ops.hidden_cosine),
    "attention_kl": _maps(ops.attention_kl, 2),
    "attention_mse": _maps(ops.attention_mse, 2),
    "relation_kl": _maps(ops.relation_kl, 1, heads=2),
}


def run(device: torch.device, names: Sequence[str] = ()) -> dict[str, str]:
    """Calls the ops and says of each what became of it: "called", or why not."""
    found: dict[str, str] = {}
    for name in names or sorted({*CALLS, *OPS}):
        if name not in OPS or name not in CALLS:
            found[name] = "no such op" if name not in OPS else "no call for it here"
            continue
        reasons = [OPS[name].missing(backend) for backend in ("cuda", "triton")]
        if device.type == "cuda" and not OPS[name].composed and all(reasons):
            found[name] = "no kernel for the GPU"
            continue
        for dtype in DTYPES if device.type == "cuda" else DTYPES[:1]:
            found[name] = _outcome(CALLS[name], device, dtype)
            if found[name] != "called":
                break
    return found


def _outcome(call: Call, device: torch.device, dtype: torch.dtype) -> str:
    try:
        # Else the definition would stand in for a kernel that fails.
        with failures_raise():
            call(device, dtype)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Skip as why:
        return f"left out: {why}"
    except Exception as error:
        return f"failed in {str(dtype).removeprefix('torch.')}: {first_line(error)}"
    return "called"


def main() -> int:
    """The script; a kernel's error ends it."""
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    failed = False
    # One at a time: what was called is told before the next may end the process.
    for name in sys.argv[1:] or sorted({*CALLS, *OPS}):
        became = run(torch.device("cuda"), [name])[name]
        print(f"{name}: {became}", flush=True)
        failed |= became.startswith("failed")
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            # After an illegal access every further call of this process would fail.
            return BROKEN
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
