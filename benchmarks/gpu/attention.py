"""Part `attention`: block-sparse against SDPA's backends and FlexAttention (G17 to G19); attention without padding."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.bench import OURS, Bench, Cell, Check, Skip, own_cost
from benchmarks.gpu.inputs import size_of
from benchmarks.gpu.measure import sdpa_paths
from benchmarks.gpu.rows import Target
from sparsebert.kernels._cost import Cost

__all__ = ["cells"]

BF16 = torch.bfloat16
OP, BOTH = ("block_sparse_attention",), ("block_sparse_attention", "block_sparse_attention_backward")
BLOCK = 64
FLEX = "FlexAttention"


def cells(bench: Bench) -> list[Cell]:
    """The goals first."""
    tiny = {"batch": 1, "heads": 2, "length": 32, "width": 32, "block": 16, "sparsity": 0.5}

    def forward(length: int, sparsity: float, least: float | None = None, width: int = 64, **more: Any) -> Cell:
        goal = "G17" if length == 4096 else "G18"
        targets = [Target(goal, "faster", least, tuple(sdpa_paths()))] if least else []
        targets += [Target("G19", "faster", 1.4, (FLEX,))] if sparsity else []
        settings = {"batch": 16384 // length, "heads": 768 // width, "length": length, "width": width}
        return Cell("block_sparse_attention", _forward,
                    {**settings, "sparsity": sparsity, "targets": tuple(targets), **more}, tiny, OP)  # fmt: skip

    def both(length: int, sparsity: float, *targets: Target) -> Cell:
        settings = {"batch": 16384 // length, "heads": 12, "length": length, "width": 64, "sparsity": sparsity}
        return Cell("block_sparse_attention, step", _step, {**settings, "targets": targets}, tiny, BOTH)

    def ragged(length: int, dtype: torch.dtype = BF16) -> Cell:
        small = {"batch": 3, "heads": 2, "length": 16, "width": 32}
        settings = {"batch": 16384 // length, "heads": 12, "length": length, "width": 64, "dtype": dtype}
        return Cell("varlen_attention", _ragged, settings, small, ("varlen_attention",))

    return [
        forward(4096, 0.75, 3.0),
        both(4096, 0.75, Target("G19", "faster", 2.7, tuple(sdpa_paths())), Target("G19", "faster", 1.4, (FLEX,))),
        forward(1024, 0.75, 2.3),
        forward(512, 0.5, 1.35),
        forward(4096, 0.0, 0.92),
        forward(4096, 0.875, 5.5),
        forward(4096, 0.95, 10.0),
        forward(4096, 0.5, 1.6),
        ragged(512),
        forward(512, 0.0, 0.92),
        forward(1024, 0.0, 0.92),
        ragged(128),
        forward(4096, 0.75, width=128),
        forward(4096, 0.75, width=32),
        forward(1024, 0.75, padded=True),
        forward(2048, 0.75),
        both(1024, 0.75),
        both(512, 0.5),
        forward(4096, 0.75, dtype=torch.float16),
        forward(4096, 0.75, block=128),
        forward(4096, 0.75, partial=True),
    ]


def _block_map(bench: Bench, heads: int, length: int, block: int, sparsity: float) -> Tensor:
    """Random, bool `[1, heads, QB, KB]`: the same number of blocks in every row, the diagonal among them."""
    side = length // block
    keep = max(1, round((1 - sparsity) * side))
    score = torch.rand(1, heads, side, side, device=bench.device) + 2 * torch.eye(side, device=bench.device)
    return score.argsort(-1, descending=True).argsort(-1) < keep


def _lists(block_map: Tensor, block: int, partial: Tensor | None = None) -> Any:
    from sparsebert.ops import BlockLists

    if partial is None:
        return BlockLists.from_block_map(block_map, block=(block, block))
    return BlockLists.from_mask(partial, block=(block, block))


def _flex(bench: Bench, block_map: Tensor, block: int, length: int) -> Callable[..., Tensor]:
    """FlexAttention over the same full blocks, compiled."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    counts = block_map.sum(-1).to(torch.int32)
    order = torch.argsort(block_map.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    none = torch.zeros_like(counts)
    mask = BlockMask.from_kv_blocks(none, order, counts, order, BLOCK_SIZE=(block, block), seq_lengths=(length, length))
    if bench.rehearsing:
        # On a CPU the compiled kernel takes minutes to build and the eager one stores the scores; enough to be called.
        return lambda q, k, v: flex_attention(q, k, v, block_mask=mask)
    run = torch.compile(flex_attention, dynamic=False)
    # Its default tiles may be larger than the blocks, which it then refuses.
    sides = ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")
    ways: list[dict[str, Any]] = [{}, {"kernel_options": dict.fromkeys(sides, min(block, 64))}]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        if len(ways) > 1:
            try:
                out = run(q, k, v, block_mask=mask, **ways[0])
            except Exception:
                ways.pop(0)
            else:
                ways.pop()
                return out
        return run(q, k, v, block_mask=mask, **ways[0])

    return call


def _made(
    bench: Bench, shape: tuple[int, ...], dtype: torch.dtype, train: bool = False
) -> Callable[[], SimpleNamespace]:
    def make() -> SimpleNamespace:
        q, k, v, grad = (torch.randn(shape, device=bench.device).to(dtype) for _ in range(4))
        if train:
            q, k, v = (x.requires_grad_() for x in (q, k, v))
        return SimpleNamespace(q=q, k=k, v=v, grad=grad if train else None)

    return make


def _exact(dense: Tensor, to: torch.dtype) -> Callable[[Any], Tensor]:
    """The attention in `to`, by head to spare memory; `dense` is a bool mask `[.., heads or 1, S, S]`."""

    def call(s: Any) -> Tensor:
        out = torch.empty(s.q.shape, dtype=to, device=s.q.device)
        for b in range(s.q.shape[0]):
            for h in range(s.q.shape[1]):
                q, k, v = (x[b, h].detach().to(to) for x in (s.q, s.k, s.v))
                allowed = dense[min(b, len(dense) - 1), min(h, dense.shape[1] - 1)]
                scores = (q @ k.t()).float() if to != torch.float64 else q @ k.t()
                scores = (scores * q.shape[-1] ** -0.5).masked_fill(~allowed, -torch.inf)
                out[b, h] = torch.softmax(scores, -1).nan_to_num(0.0).to(to) @ v
        return out

    return call


def _attention_cost(
    batch: int,
    heads: int,
    length: int,
    width: int,
    item: int,
    kept: float,
    block: int,
    train: bool = False,
    partial: bool = False,
) -> tuple[Cost, str]:
    """What the kernel says it does, else the least: q, k, v and the result once, the kept scores twice (5 + 2 times
    with the backward)."""
    size, scores = batch * heads * length * width * item, batch * heads * length * length * width
    blocks = batch * heads * max(1, round(kept * length / block)) * (length // block)
    known = {"sizes": (batch, heads, length, length), "dim": width, "block": (block, block), "blocks": blocks,
             "partial": blocks * partial, "bytes_each": item}  # fmt: skip
    launched = own_cost("block_sparse_attention", **known)
    back = own_cost("block_sparse_attention_backward", **known) if train else None
    if launched is not None and (back is not None or not train):
        return launched if back is None else launched + back, "as launched"
    least = Cost(3 * size, size, round(4 * scores * kept))
    if train:
        least += Cost(6 * size, 3 * size, round(10 * scores * kept))
    return least, ""


def _forward(
    bench: Bench,
    batch: int,
    heads: int,
    length: int,
    width: int,
    sparsity: float,
    block: int = BLOCK,
    dtype: torch.dtype = BF16,
    padded: bool = False,
    partial: bool = False,
    targets: tuple[Target, ...] = (),
) -> None:
    """Forward; FlexAttention on the same blocks, SDPA dense by each backend; then what the lists cost."""
    from sparsebert.ops import block_sparse_attention

    block_map = _block_map(bench, heads, length, block, sparsity)
    dense = block_map.repeat_interleave(block, 2).repeat_interleave(block, 3)
    if partial:
        dense = dense & (torch.rand(dense.shape, device=bench.device) > 0.05)
    lists = _lists(block_map, block, dense if partial else None)
    key_mask = allowed = None
    if padded:
        lengths = torch.linspace(0.2, 1.0, batch, device=bench.device).mul(length).ceil()
        key_mask = torch.arange(length, device=bench.device) < lengths[:, None]
        dense, allowed = dense & key_mask[:, None, None, :], key_mask[:, None, None, :]

    def ours(s: Any) -> Any:
        return block_sparse_attention(s.q, s.k, s.v, lists, key_mask=key_mask)

    calls: dict[str, Any] = {OURS: ours}
    for name, path in sdpa_paths().items():
        if name != "math" or length <= 512:
            calls[name] = lambda s, path=path: path(s.q, s.k, s.v, allowed)
    if sparsity and not padded and not partial:
        flex = _flex(bench, block_map, block, length)
        calls[FLEX] = lambda s: flex(s.q, s.k, s.v)
    cost, origin = _attention_cost(batch, heads, length, width, 2, 1 - sparsity, block, partial=partial)
    case = {"B": batch, "H": heads, "S": length, "d": width, "sparsity": sparsity, "block": block,
            "dtype": str(dtype).removeprefix("torch."), **({"": "padded"} if padded else {}),
            **({"": "5 % of partial blocks' bits gone"} if partial else {})}  # fmt: skip
    row = bench.compare(
        case, _made(bench, (batch, heads, length, width), dtype), calls,
        check=Check(_exact(dense, torch.float64), _exact(dense, dtype)), limit=cost, limit_from=origin, targets=targets,
    )  # fmt: skip
    if row is not None and not partial and not padded:
        _building(bench, case, block_map, block, row["times"][OURS]["median"])


def _building(bench: Bench, case: dict[str, Any], block_map: Tensor, block: int, forward: float) -> None:
    """What the lists cost beside the forward: built once for all layers and batches that share a pattern."""

    def build(_: Any) -> Any:
        return _lists(block_map, block).transposed()

    bench.clock.warm(build, [None])
    took = bench.clock.interleave({"lists": build}, [None], "gpu")["lists"].median * 1e3
    facts = {"lists, ms": took, "lists over one forward": took / forward, "over 12 layers": took / forward / 12}
    bench.facts(case, facts, [Target("G19", "value", 0.03, key="over 12 layers")])


def _step(
    bench: Bench,
    batch: int,
    heads: int,
    length: int,
    width: int,
    sparsity: float,
    block: int = BLOCK,
    dtype: torch.dtype = BF16,
    targets: tuple[Target, ...] = (),
) -> None:
    """Forward and backward: gradients of q, k and v."""
    from sparsebert.ops import block_sparse_attention

    block_map = _block_map(bench, heads, length, block, sparsity)
    dense = block_map.repeat_interleave(block, 2).repeat_interleave(block, 3)
    lists = _lists(block_map, block)
    lists.transposed()

    def step(path: Callable[..., Any]) -> Callable[[Any], tuple[Tensor, ...]]:
        def call(s: Any) -> tuple[Tensor, ...]:
            out = path(s.q, s.k, s.v)
            return (out, *torch.autograd.grad(out, (s.q, s.k, s.v), s.grad.to(out.dtype)))

        return call

    def exactly(to: torch.dtype) -> Callable[[Any], tuple[Tensor, ...]]:
        def call(s: Any) -> tuple[Tensor, ...]:
            q, k, v = (x.detach().to(to).requires_grad_() for x in (s.q, s.k, s.v))
            # The first sequence alone: the others are computed alike, and would need its memory as often.
            scores = (q[:1] @ k[:1].mT) * width**-0.5
            out = torch.softmax(scores.masked_fill(~dense, -torch.inf), -1) @ v[:1]
            return (out, *(g[:1] for g in torch.autograd.grad(out, (q, k, v), s.grad[:1].to(to))))

        return call

    ours = step(lambda q, k, v: block_sparse_attention(q, k, v, lists))
    calls: dict[str, Any] = {OURS: ours}
    calls |= {name: step(path) for name, path in sdpa_paths().items() if name != "math"}
    if not bench.rehearsing:
        calls[FLEX] = step(_flex(bench, block_map, block, length))
    cost, origin = _attention_cost(batch, heads, length, width, 2, 1 - sparsity, block, train=True)
    bench.compare(
        {"B": batch, "H": heads, "S": length, "d": width, "sparsity": sparsity, "block": block, "": "with backward"},
        _made(bench, (batch, heads, length, width), dtype, train=True),
        calls,
        check=Check(
            exactly(torch.float64), exactly(dtype), 3.0, ours=lambda s: tuple(t[:1].contiguous() for t in ours(s))
        ),
        limit=cost,
        limit_from=origin,
        targets=targets,
    )


def _ragged(
    bench: Bench, batch: int, heads: int, length: int, width: int, dtype: torch.dtype = BF16, mean: float = 0.6
) -> None:
    """Sequences one after the other without padding, against torch's own for such, SDPA on the padded batch and on a
    nested tensor."""
    from sparsebert.nn.attention_patterns import dense as every_block
    from sparsebert.ops import block_sparse_attention, varlen_attention

    lengths = torch.linspace(2 * mean - 1, 1.0, batch, device=bench.device).mul(length).round().long().clamp(min=1)
    real = torch.arange(length, device=bench.device) < lengths[:, None]
    starts = F.pad(lengths.cumsum(0), (1, 0))
    tokens = int(starts[-1])
    if tokens == 0:
        raise Skip("no token")

    def make() -> Any:
        q, k, v = (torch.randn(tokens, heads, width, device=bench.device).to(dtype) for _ in range(3))
        wide = [torch.zeros(batch, length, heads, width, device=bench.device, dtype=dtype) for _ in range(3)]
        for whole, part in zip(wide, (q, k, v), strict=True):
            whole[real] = part
        nested = [torch.nested.nested_tensor_from_jagged(x, starts).transpose(1, 2) for x in (q, k, v)]
        return SimpleNamespace(q=q, k=k, v=v, wide=[x.transpose(1, 2) for x in wide], nested=nested)

    def exactly(to: torch.dtype) -> Callable[[Any], Tensor]:
        def call(s: Any) -> Tensor:
            q, k, v = (x.to(to) for x in s.wide)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :])
            return out.transpose(1, 2)[real]

        return call

    calls: dict[str, Any] = {OURS: lambda s: varlen_attention(s.q, s.k, s.v, starts)}
    keys = real[:, None, None, :]
    calls["padded, torch's choice"] = lambda s: F.scaled_dot_product_attention(*s.wide, attn_mask=keys)
    calls["nested"] = lambda s: F.scaled_dot_product_attention(*s.nested)
    whole = every_block(length).to(bench.device)
    calls["block-sparse, every block"] = lambda s: block_sparse_attention(s.q, s.k, s.v, whole, cu_seqlens=starts)
    calls |= _torch_varlen(starts, int(lengths.max()))
    launched = own_cost("varlen_attention", lengths=lengths.tolist(), heads=heads, dim=width, bytes_each=size_of(dtype))
    size = tokens * heads * width * size_of(dtype)
    least = Cost(3 * size, size, 4 * heads * width * int(lengths.square().sum()))
    bench.compare(
        {"B": batch, "H": heads, "S": length, "mean length": mean, "d": width, "dtype": str(dtype)[6:]},
        make,
        calls,
        check=Check(exactly(torch.float64), exactly(dtype)),
        limit=launched or least,
        limit_from="as launched" if launched else "",
    )  # fmt: skip


def _torch_varlen(starts: Tensor, longest: int) -> dict[str, Any]:
    """torch's flash attention for such sequences, where this torch has it; it is told the longest one."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return {}
    begins = starts.int()
    return {"torch varlen": lambda s: varlen_attn(s.q, s.k, s.v, begins, begins, longest, longest)}
