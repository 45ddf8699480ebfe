"""Part `distill`: the distillation losses, forward and gradient, against eager torch and torch.compile (G20 to G25)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu.bench import OURS, Bench, Cell, Check, own_cost, tensors_of
from benchmarks.gpu.rows import Target
from sparsebert.kernels._cost import Cost
from sparsebert.ops import attention_kl, attention_mse, hidden_cosine, hidden_mse, relation_kl, soft_cross_entropy

__all__ = ["cells", "eager_map_loss", "with_gradients"]

BF16 = torch.bfloat16
TEMPERATURE = 2.0
EXACT = 0.01
"""Relative error that a loss and its bf16 gradient may have (G25)."""


def cells(bench: Bench) -> list[Cell]:
    """One cell of each loss first."""
    small = {"batch": 2, "heads": 2, "length": 8, "width": 16}

    def logits(rows: int, classes: int, dtype: torch.dtype = BF16) -> Cell:
        return Cell("soft_cross_entropy", _logits, {"rows": rows, "classes": classes, "dtype": dtype},
                    {"rows": 6, "classes": min(classes, 40)}, ("soft_cross_entropy",))  # fmt: skip

    def hidden(kind: str, masked: bool = False, dtype: torch.dtype = BF16) -> Cell:
        return Cell(f"hidden_{kind}", _hidden,
                    {"kind": kind, "layers": 13, "batch": 32, "length": 512, "width": 768, "masked": masked,
                     "dtype": dtype},
                    {"layers": 2, "batch": 2, "length": 4, "width": 24}, (f"hidden_{kind}",))  # fmt: skip

    def maps(kind: str, length: int, masked: bool = False, dtype: torch.dtype = BF16) -> Cell:
        return Cell(kind, _maps, {"kind": kind, "batch": 16384 // length, "heads": 12, "length": length, "width": 64,
                                  "masked": masked, "dtype": dtype}, small, (kind,))  # fmt: skip

    head = {"rows": 16384, "classes": 30522, "student": 768, "teacher": 768}
    return [
        logits(16384, 30522),
        maps("attention_kl", 512),
        hidden("mse"),
        Cell("linear_soft_cross_entropy", _head, head, {"rows": 6, "classes": 40, "student": 16, "teacher": 32},
             ("linear_soft_cross_entropy",)),
        Cell("all terms of a step", _together, {"layers": 12, "batch": 32, "heads": 12, "length": 128, "width": 64},
             {"layers": 1, **small}, ("soft_cross_entropy", "hidden_mse", "attention_kl")),
        maps("attention_mse", 512),
        maps("relation_kl", 512),
        hidden("mse", masked=True),
        hidden("cosine"),
        maps("attention_kl", 128),
        logits(16384, 3),
        maps("attention_kl", 512, masked=True),
        logits(4096, 131072),
        logits(16384, 30522, torch.float32),
        Cell("linear_soft_cross_entropy", _head, {**head, "teacher": 1024},
             {"rows": 6, "classes": 40, "student": 16, "teacher": 32}, ("linear_soft_cross_entropy",)),
        hidden("cosine", masked=True),
        maps("attention_mse", 512, masked=True),
        maps("relation_kl", 128),
        logits(16384, 30522, torch.float16),
        maps("attention_kl", 512, dtype=torch.float32),
    ]  # fmt: skip


Loss = Callable[..., Tensor]


def with_gradients(
    loss: Callable[[Any], Tensor], leaves: Callable[[Any], Sequence[Tensor]], scale: float = 1.0
) -> Callable[[Any], Any]:
    """The loss, as `[1]`, and the gradients of `scale` times it."""

    def call(s: Any) -> list[Tensor]:
        value = loss(s)
        return [
            value.detach().reshape(1),
            *torch.autograd.grad(value if scale == 1.0 else value * scale, list(leaves(s))),
        ]

    return call


def _race(
    bench: Bench,
    case: dict[str, Any],
    make: Callable[[], Any],
    leaves: str,
    ours: Callable[[Any], Tensor],
    others: dict[str, Callable[[Any], Tensor]],
    truth: Callable[[Any], Tensor],
    limit: Cost,
    targets: Sequence[Target] = (),
    memory: Sequence[str] = (),
    extra: Callable[[float], dict[str, float]] = lambda seconds: {},
    limit_from: str = "",
    scale: float = 1.0,
) -> None:
    """Check against `truth`, which gets the set in float64, then time; memory of ours and of the `memory` named.

    Gradients are those of the loss times `scale`, as float16 is trained.

    `extra` makes facts of the seconds that ours takes.
    """

    def of(call: Callable[[Any], Tensor]) -> Callable[[Any], Any]:
        return with_gradients(call, lambda s: tensors_of(getattr(s, leaves)), scale)

    def exact(s: Any) -> Any:
        wide = SimpleNamespace(**{name: _wide(value) for name, value in vars(s).items()})
        return with_gradients(truth, lambda _: tensors_of(getattr(wide, leaves)), scale)(wide)

    calls = {OURS: of(ours), **{name: of(call) for name, call in others.items()}}
    row = bench.compare(
        case, make, calls, check=Check(exact, least=EXACT), limit=limit, limit_from=limit_from,
        targets=[*(t for t in targets if not t.key), Target("G25", "value", EXACT, key="error")], graph=False,
    )  # fmt: skip
    if row is None:
        return
    inputs = bench.sets(make, "warm")[0]
    peaks = {name: bench.peak(calls[name], inputs) for name in (OURS, *memory) if name in row["times"]}
    grads = sum(t.numel() * t.element_size() for t in tensors_of(getattr(inputs, leaves)))
    facts: dict[str, Any] = extra(row["times"][OURS]["median"] * 1e-3)
    # Beside the gradients, which every way has to return.
    beside = {name: max(peak - grads, 1) for name, peak in peaks.items() if peak is not None}
    if OURS in beside:
        facts |= {f"{name}, MB beside the gradients": size / 1e6 for name, size in beside.items()}
        facts |= {f"memory over {name}'s": beside[OURS] / beside[name] for name in memory if name in beside}
    if facts:
        bench.facts(case, facts, [target for target in targets if target.key])


def _wide(value: Any) -> Any:
    """Floats in float64, as leaves where they were."""
    if isinstance(value, (list, tuple)):
        return [_wide(item) for item in value]
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def _logits(bench: Bench, rows: int, classes: int, dtype: torch.dtype) -> None:
    def make() -> Any:
        student, teacher = ((torch.randn(rows, classes, device=bench.device) * 3).to(dtype) for _ in range(2))
        return SimpleNamespace(student=student.requires_grad_(), teacher=teacher)

    def eager(student: Tensor, teacher: Tensor) -> Tensor:
        log_student = F.log_softmax(student.float() / TEMPERATURE, -1)
        soft = F.softmax(teacher.float() / TEMPERATURE, -1)
        return F.kl_div(log_student, soft, reduction="batchmean") * TEMPERATURE**2

    def truth(s: Any) -> Tensor:
        # By a formula of its own: the cross entropy is the divergence plus the teacher's entropy.
        soft = torch.softmax(s.teacher / TEMPERATURE, -1)
        return -(soft * torch.log_softmax(s.student / TEMPERATURE, -1)).sum(-1).mean() * TEMPERATURE**2

    compiled = bench.compiled(eager)
    big = rows * classes > 1 << 26
    targets = [Target("G20", "limit", 0.8)] if big else []
    targets += [Target("G21", "faster", 10.0, ("eager",)), Target("G21", "faster", 1.8, ("compiled",))] if big else []
    size = 2 if dtype != torch.float32 else 4
    _race(
        bench, {"rows": rows, "classes": classes, "dtype": str(dtype).removeprefix("torch.")}, make, "student",
        lambda s: soft_cross_entropy(s.student, s.teacher, temperature=TEMPERATURE),
        {"eager": lambda s: eager(s.student, s.teacher), "compiled": lambda s: compiled(s.student, s.teacher)},
        # 6 bytes an element in bf16: two logits read, a gradient written.
        truth, Cost(2 * size * rows * classes, size * rows * classes, 0), targets, ("eager", "compiled"),
        # The largest gradients are some 1e-6 at 16,384 rows, where float16 has no digits left.
        scale=2.0**20 if dtype == torch.float16 else 1.0,
    )  # fmt: skip


def _head(bench: Bench, rows: int, classes: int, student: int, teacher: int) -> None:
    from sparsebert.ops import linear_soft_cross_entropy  # type: ignore[attr-defined]

    def make() -> Any:
        def states(width: int) -> tuple[Tensor, Tensor]:
            hidden = torch.randn(rows, width, device=bench.device)
            return hidden.to(BF16), (torch.randn(classes, width, device=bench.device) * 3 / width**0.5).to(BF16)

        (hs, ws), (ht, wt) = states(student), states(teacher)
        return SimpleNamespace(student=[hs.requires_grad_(), ws.requires_grad_()], teacher=[ht, wt])

    def eager(hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
        log_student = F.log_softmax(F.linear(hs, ws).float() / TEMPERATURE, -1)
        soft = F.softmax(F.linear(ht, wt).float() / TEMPERATURE, -1)
        return F.kl_div(log_student, soft, reduction="batchmean") * TEMPERATURE**2

    def truth(s: Any) -> Tensor:
        (hs, ws), (ht, wt) = s.student, s.teacher
        loss = torch.zeros((), dtype=torch.float64, device=hs.device)
        # The whole in float64 would be several times the logits: by chunks, the earlier recomputed in the backward.
        for a, b in zip(hs.split(2048), ht.split(2048), strict=True):
            loss = loss + checkpoint(_soft_rows, a, ws, b, wt, use_reentrant=False)
        return loss * (TEMPERATURE**2 / rows)

    compiled = bench.compiled(eager)
    # The student's logits, the teacher's, and two products of the gradient: what must be computed without recomputing.
    flops = 2 * rows * classes * (3 * student + teacher)
    size = 2 * (rows + classes) * (student + teacher)
    _race(
        bench, {"tokens": rows, "V": classes, "H": f"{student} and {teacher}", "dtype": "bf16"}, make, "student",
        lambda s: linear_soft_cross_entropy(*s.student, *s.teacher, temperature=TEMPERATURE),
        {"eager": lambda s: eager(*s.student, *s.teacher), "compiled": lambda s: compiled(*s.student, *s.teacher)},
        truth, Cost(size, 2 * (rows + classes) * student, flops),
        [Target("G22", "rate", 450.0, key="TFLOP/s"),
         Target("G22", "value", 128.0, key=f"{OURS}, MB beside the gradients")],
        ("eager", "compiled"), lambda seconds: {"TFLOP/s": flops / seconds / 1e12},
    )  # fmt: skip


def _soft_rows(hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
    log_student = torch.log_softmax(F.linear(hs, ws) / TEMPERATURE, -1)
    return -(torch.softmax(F.linear(ht, wt) / TEMPERATURE, -1) * log_student).sum()


def _hidden(
    bench: Bench, kind: str, layers: int, batch: int, length: int, width: int, masked: bool, dtype: torch.dtype
) -> None:
    shape = (batch, length, width)
    tokens = _tokens(bench, batch, length) if masked else None

    def make() -> Any:
        student, teacher = (
            [torch.randn(shape, device=bench.device).to(dtype) for _ in range(layers)] for _ in range(2)
        )  # fmt: skip
        return SimpleNamespace(student=[s.requires_grad_() for s in student], teacher=teacher)

    def of_layer(s: Tensor, t: Tensor) -> Tensor:
        if kind == "mse":
            if tokens is None:
                return F.mse_loss(s, t)
            return ((s - t).square() * tokens.unsqueeze(-1)).sum() / (tokens.sum() * width)
        rows = 1 - F.cosine_similarity(s, t, dim=-1)
        return rows.mean() if tokens is None else (rows * tokens).sum() / tokens.sum()

    def eager(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        return torch.stack([of_layer(s, t) for s, t in zip(student, teacher, strict=True)]).mean()

    def in_fp32(s: Any) -> Tensor:
        return eager([x.float() for x in s.student], [x.float() for x in s.teacher])

    op = hidden_mse if kind == "mse" else hidden_cosine
    compiled = bench.compiled(eager)
    targets = []
    if kind == "mse" and dtype == BF16 and not masked:
        targets = [Target("G23", "faster", 1.5, ("eager",)), Target("G23", "faster", 4.0, ("eager, fp32",))]
    size = layers * batch * length * width * torch.empty((), dtype=dtype).element_size()
    case = {"layers": layers, "B": batch, "S": length, "H": width, "masked": masked}
    _race(
        bench, {**case, "dtype": str(dtype).removeprefix("torch.")}, make, "student",
        lambda s: op(s.student, s.teacher, tokens),
        {"eager": lambda s: eager(s.student, s.teacher), "eager, fp32": in_fp32,
         "compiled": lambda s: compiled(s.student, s.teacher)},
        lambda s: eager(s.student, s.teacher), Cost(2 * size, size, 0), targets,
    )  # fmt: skip


def _tokens(bench: Bench, batch: int, length: int) -> Tensor:
    """Half of to all of the places, bool `[batch, length]`."""
    lengths = torch.linspace(length // 2, length, batch, device=bench.device).round()
    return torch.arange(length, device=bench.device) < lengths[:, None]


def eager_map_loss(kind: str, student: Sequence[Tensor], teacher: Sequence[Tensor], tokens: Tensor | None) -> Tensor:
    """The maps stored whole; `[q, k]` of each side, or one tensor for a relation."""
    sides = [(pair[0], pair[-1]) for pair in (student, teacher)]
    s, t = (q @ k.mT * q.shape[-1] ** -0.5 for q, k in sides)
    if tokens is not None:
        s, t = (x.masked_fill(~tokens[:, None, None, :], torch.finfo(x.dtype).min) for x in (s, t))
    heads = s.shape[1]
    if kind == "attention_mse":
        squares = (F.softmax(s, -1) - F.softmax(t, -1)).square()
        if tokens is None:
            return squares.mean()
        return (squares * tokens[:, None, :, None]).sum() / (heads * tokens.sum(-1).square().sum())
    rows = F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="none").sum(-1)
    return rows.mean() if tokens is None else (rows * tokens[:, None, :]).sum() / (heads * tokens.sum())


MAPS: dict[str, Loss] = {"attention_kl": attention_kl, "attention_mse": attention_mse, "relation_kl": relation_kl}


def _maps(
    bench: Bench, kind: str, batch: int, heads: int, length: int, width: int, masked: bool, dtype: torch.dtype
) -> None:
    one = kind == "relation_kl"
    tokens = _tokens(bench, batch, length) if masked else None

    def projected() -> Tensor:
        made = torch.randn(batch, length, heads, width, device=bench.device) * (0.5 if one else 1.5)
        return made.to(dtype).transpose(1, 2)

    def make() -> Any:
        student = [projected().requires_grad_() for _ in range(1 if one else 2)]
        return SimpleNamespace(student=student, teacher=[projected() for _ in student])

    compiled = bench.compiled(lambda s, t: eager_map_loss(kind, s, t, tokens))
    item, count = torch.empty((), dtype=dtype).element_size(), batch * heads * length * width
    launched = own_cost(
        kind, batch=batch, heads=heads, seq=length, student_width=width, teacher_width=width, width=width,
        student_bytes=item, teacher_bytes=item, need_grad=True, masked=masked,
    )  # fmt: skip
    # Both maps once, and a product each for the gradients of q and k.
    tensors = item * count * (1 if one else 2)
    least = Cost(2 * tensors, tensors, 8 * batch * heads * length**2 * width)
    targets = []
    if length == 512 and dtype == BF16:
        targets = [Target("G24", "faster", 4.0, ("eager",)), Target("G24", "value", 0.02, key="memory over eager's")]
    case = {"B": batch, "H": heads, "S": length, "d": width, "masked": masked}
    _race(
        bench, {**case, "dtype": str(dtype).removeprefix("torch.")}, make, "student",
        lambda s: MAPS[kind](*s.student, *s.teacher, tokens),
        {"eager": lambda s: eager_map_loss(kind, s.student, s.teacher, tokens),
         "compiled": lambda s: compiled(s.student, s.teacher)},
        lambda s: eager_map_loss(kind, s.student, s.teacher, tokens), launched or least, targets, ("eager",),
        limit_from="as launched" if launched else "",
    )  # fmt: skip


def _together(bench: Bench, layers: int, batch: int, heads: int, length: int, width: int) -> None:
    """Logits, hidden states and attention maps of a whole model: what the losses take of a distillation step (G30)."""
    hidden = heads * width

    def make() -> Any:
        def side(train: bool) -> Any:
            def tensors(count: int, *shape: int) -> list[Tensor]:
                made = [torch.randn(shape, device=bench.device).to(BF16) for _ in range(count)]
                return [t.requires_grad_(train) for t in made]

            maps = tensors(2 * layers, batch, heads, length, width)
            return [tensors(1, batch, 3)[0], tensors(layers + 1, batch, length, hidden), maps]

        return SimpleNamespace(student=side(True), teacher=side(False))

    def ours(s: Any) -> Tensor:
        (logits, states, maps), (t_logits, t_states, t_maps) = s.student, s.teacher
        loss = soft_cross_entropy(logits, t_logits, temperature=TEMPERATURE) + hidden_mse(states, t_states)
        pairs = zip(maps[::2], maps[1::2], t_maps[::2], t_maps[1::2], strict=True)
        return loss + torch.stack([attention_kl(*pair) for pair in pairs]).mean()

    def eager(s: Any) -> Tensor:
        (logits, states, maps), (t_logits, t_states, t_maps) = s.student, s.teacher
        wide = torch.promote_types(logits.dtype, torch.float32)
        soft = torch.softmax(t_logits.to(wide) / TEMPERATURE, -1)
        loss = -(soft * torch.log_softmax(logits.to(wide) / TEMPERATURE, -1)).sum(-1).mean() * TEMPERATURE**2
        distances = [F.mse_loss(a.to(wide), b.to(wide)) for a, b in zip(states, t_states, strict=True)]
        loss = loss + torch.stack(distances).mean()
        pairs = zip(maps[::2], maps[1::2], t_maps[::2], t_maps[1::2], strict=True)
        terms = [eager_map_loss("attention_kl", (q, k), (tq, tk), None) for q, k, tq, tk in pairs]
        return loss + torch.stack(terms).mean()

    size = 2 * batch * length * hidden
    cost = Cost(size * (2 * (layers + 1) + 4 * layers), size * (layers + 1 + 2 * layers),
                8 * layers * batch * heads * length**2 * width)  # fmt: skip
    case = {"layers": layers, "B": batch, "H": heads, "S": length, "d": width, "dtype": "bf16"}
    _race(bench, case, make, "student", ours, {"eager": eager}, eager, cost,
          [Target("G30", "faster", 2.5, ("eager",))], ("eager",))  # fmt: skip
