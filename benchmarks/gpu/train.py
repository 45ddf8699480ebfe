"""Part `train`: the main job on the GPU, and a step of every method against the eager way of its kind (G2, G30).

Steps are timed as they run: host and GPU, forward to optimiser, autocast to bfloat16. Peak memory is what a step has
allocated beyond what lives between steps.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import distill_steps, steps
from benchmarks.gpu.bench import OURS, Bench, Cell, Red, Skip
from benchmarks.gpu.rows import Target
from sparsebert.methods import METHODS, Context, Method, Phase
from sparsebert.models.prunable import prunable_matrices
from sparsebert.models.task_model import TaskModel
from sparsebert.patterns import parse_pattern

__all__ = ["cells"]

BF16 = torch.bfloat16
LEARNED = ("adapt_prune", "movement", "soft_movement", "smp", "tamt")
"""Methods whose masks follow scores: the eager way sorts them in every forward."""
DISTILLING = ("kd", "pkd", "tinybert", "minilm", "mix_kd", "bert_emd", "cr_ild", "spd", "theseus")
TERMS = "the same losses written out on maps and states that the models return"


def cells(bench: Bench) -> list[Cell]:
    """The goals and the main job first, then every method."""
    sizes = {"shape": "bert-base", "batch": 32, "length": 128}
    tiny = {"shape": "tiny", "batch": 2, "length": 8}
    order = [*LEARNED[:1], "tamt", "spd", "cr_ild", *METHODS]
    found = [
        Cell("fine-pruning and distillation", _fine_pruning, sizes, tiny, (), 240.0),
        Cell("adapt_prune, step", _masked_step, sizes, tiny, (), 240.0),
        Cell("main job", _main_job, {"steps": 200, "shape": "bert-base"}, {"steps": 2, "shape": "tiny"}, (), 300.0),
        Cell("distillation, step", _distilled_step, sizes, tiny, (), 240.0),
        Cell("fine-pruning and distillation", _fine_pruning, {**sizes, "length": 384, "batch": 16}, tiny, (), 240.0),
        Cell("adapt_prune, step", _masked_step, {**sizes, "batch": 128}, tiny, (), 240.0),
        Cell("adapt_prune, step", _masked_step, {**sizes, "batch": 8}, tiny, (), 240.0),
    ]
    return found + [Cell(name, _method, {"name": name, **sizes}, tiny, (), 120.0) for name in dict.fromkeys(order)]


Step = Callable[[Any], Any]


def _compare(
    bench: Bench, case: dict[str, Any], calls: dict[str, Callable[[], Any]], targets: tuple[Target, ...] = (),
    notes: tuple[str, ...] = (), seconds: float = 12.0,
) -> None:  # fmt: skip
    """Times steps as they run, and the memory that each takes at its peak."""
    taken: dict[str, Step] = {name: lambda _, call=call: call() for name, call in calls.items()}  # type: ignore[misc]
    row = bench.compare(case, [None], taken, state="as run", how="host", targets=targets, notes=notes, seconds=seconds)
    if row is None or not bench.cuda:
        return
    peaks = {name: bench.peak(taken[name], None) for name in row["times"]}
    ours = peaks[OURS]
    facts: dict[str, Any] = {f"{name}, MB at the peak": (peak or 0) / 1e6 for name, peak in peaks.items()}
    if ours and peaks.get("eager"):
        facts["memory over eager's"] = ours / peaks["eager"]  # type: ignore[operator]
    bench.facts(case, facts, [Target("G30", "value", 0.5, key="memory over eager's")] if targets else [])


def _masked_step(bench: Bench, shape: str, batch: int, length: int) -> None:
    """adapt_prune's step, dense fine-tuning, and movement pruning's eager masking."""
    kind = bench.device.type
    calls: dict[str, Callable[[], Any]] = {}
    for ours, name, attention in ((OURS, "adapt_prune", "sdpa"), ("dense", "dense, no dropout", "sdpa"),
                                  ("eager", "eager", "sdpa"), ("eager attention too", "eager", "eager")):  # fmt: skip
        calls[ours] = steps.make_step(name, shape, batch, length, BF16, kind, attention)
    _compare(bench, {"model": shape, "B": batch, "S": length, "dtype": "bf16"}, calls)


def _distilled_step(bench: Bench, shape: str, batch: int, length: int) -> None:
    """Logits, labels, hidden states and attention maps distilled between models of one shape."""
    kind = bench.device.type
    calls = {
        OURS: distill_steps.make_step("distill", shape, batch, length, BF16, kind, "sdpa"),
        "eager": distill_steps.make_step("eager", shape, batch, length, BF16, kind),
        "plain fine-tuning": distill_steps.make_step("finetune", shape, batch, length, BF16, kind, "sdpa"),
    }
    _near(calls[OURS], calls["eager"])
    _compare(bench, {"model": shape, "B": batch, "S": length, "dtype": "bf16"}, calls, notes=(f"eager: {TERMS}",))


def _near(ours: Callable[[], Tensor], eager: Callable[[], Tensor]) -> None:
    """Raises Red unless the losses fall alike in a step, as far as bfloat16 knows them.

    Not the losses themselves: a cross entropy is a divergence plus the teacher's entropy, a constant.
    """
    losses = {name: [float(step()), float(step())] for name, step in (("ours", ours), ("eager", eager))}
    falls = {name: first - second for name, (first, second) in losses.items()}
    known = 2**-8 * abs(losses["eager"][0])
    if not abs(falls["ours"] - falls["eager"]) <= 0.05 * abs(falls["eager"]) + known:
        raise Red(f"wrong result: a step lowers the loss by {falls['ours']:.4g}, an eager one by {falls['eager']:.4g}")


def _fine_pruning(bench: Bench, shape: str, batch: int, length: int) -> None:
    """Scores trained under a teacher: masks, logits, hidden states and maps in one step (G30)."""
    calls = {OURS: _pruned_and_taught(bench, shape, batch, length, False),
             "eager": _pruned_and_taught(bench, shape, batch, length, True)}  # fmt: skip
    for name, call in calls.items():
        if not bool(torch.isfinite(call()).all()):
            raise Red(f"{name}: the loss is not finite")
    case = {"model": shape, "B": batch, "S": length, "dtype": "bf16"}
    _compare(bench, case, calls, (Target("G30", "faster", 2.5, ("eager",)),), (f"eager: {TERMS}, scores sorted",))


def _pruned_and_taught(bench: Bench, shape: str, batch: int, length: int, eager: bool) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    attention = "eager" if eager else "sdpa"
    student, teacher = (distill_steps._model(shape, attention).to(bench.device) for _ in range(2))
    inputs = {name: tensor.to(bench.device) for name, tensor in distill_steps._inputs(batch, length).items()}
    teacher.requires_grad_(False).eval()
    module, groups, before, after = (steps._eager if eager else steps._adapt_prune)(student, BF16)
    objective: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    if eager:
        objective = distill_steps._Eager(student, teacher)
    else:
        layers = range(1, steps.SHAPES[shape]["num_hidden_layers"] + 1)
        pairs = [(layer, layer) for layer in layers]
        terms = [distill_steps.Logits(distill_steps.TEMPERATURE), distill_steps.Labels(),
                 distill_steps.Hidden([(0, 0), *pairs]), distill_steps.AttentionMSE(pairs)]  # fmt: skip
        objective = distill_steps.Distillation(student, teacher, terms)
    module.train()
    optimizer = torch.optim.AdamW(groups, lr=1e-5, weight_decay=0.0, fused=True)
    return _stepper(bench, lambda: objective(inputs)["loss"], optimizer, before, after)


def _stepper(
    bench: Bench,
    loss_of: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    before: Callable[[int], Any],
    after: Callable[[int], Any],
) -> Callable[[], Tensor]:
    """One optimiser step, forward to optimiser, which returns its loss."""
    taken = 0

    def step() -> Tensor:
        nonlocal taken
        taken += 1
        with torch.autocast(bench.device.type, dtype=BF16):
            loss = loss_of()
        loss.backward()
        before(taken)
        optimizer.step()
        after(taken)
        optimizer.zero_grad()
        return loss.detach()

    return step


def built(bench: Bench, name: str, shape: str, sparsity: float = 0.5) -> Method:
    """A method on a random BERT, with its default settings, its teacher where it wants one."""
    from transformers import BertConfig, BertModel

    method = METHODS[name]
    settings = method.Settings()

    def base(seed: int) -> Any:
        torch.manual_seed(seed)
        return BertModel(BertConfig(**steps.SHAPES[shape], attn_implementation="sdpa"))

    small = base(0)
    if steps.SHAPES[shape]["num_hidden_layers"] > 1:
        method.shape(small, settings)
    head = method.defaults.get("head", "mlp")
    model = TaskModel(small, "classification", 2, seed=0, head=head).to(bench.device)
    teacher = None
    if method.wants_teacher(settings):
        teacher = TaskModel(base(1), "classification", 2, seed=1, head=head).to(bench.device).eval()
    pattern = parse_pattern("unstructured")
    context = Context(
        model=model, matrices=prunable_matrices(model.base), pattern=pattern, sparsity=sparsity, allocation="global",
        dtype=BF16, seed=0, untouched=False, teacher=teacher,
    )  # fmt: skip
    return method(context, settings)


def _method(bench: Bench, name: str, shape: str, batch: int, length: int) -> None:
    """A step of each phase of the method, against dense fine-tuning and the eager way of its kind."""
    kind = bench.device.type
    others = {"dense": steps.make_step("dense", shape, batch, length, BF16, kind, "sdpa")}
    if name in LEARNED:
        others["eager"] = steps.make_step("eager", shape, batch, length, BF16, kind, "sdpa")
    if name in DISTILLING:
        others["eager"] = distill_steps.make_step("eager", shape, batch, length, BF16, kind)
    for phase, step in phases_of(bench, built(bench, name, shape), batch, length):
        if not bool(torch.isfinite(step()).all()):
            raise Red(f"phase {phase.name}: the loss is not finite")
        case = {"method": name, "phase": phase.name, "model": shape, "B": batch, "S": length, "dtype": "bf16"}
        notes = (f"eager: {TERMS}",) if name in DISTILLING else ()
        _compare(bench, case, {OURS: step, **others}, notes=notes, seconds=4.0)


def phases_of(bench: Bench, method: Method, batch: int, length: int) -> Iterator[tuple[Phase, Callable[[], Tensor]]]:
    """Each phase, started, with its step; finished before the next."""
    for phase in method.phases():
        phase.start()
        # What a phase makes anew, a head for one, is made on the CPU.
        method.module.to(bench.device)
        groups = [group for group in phase.parameter_groups(1e-5) if group["params"]]
        optimizer = torch.optim.AdamW(groups, lr=1e-5, weight_decay=0.0)
        phase.loaded()
        method.module.train()
        inputs = _batch(bench, phase, batch, length)

        def loss_of(inputs: dict[str, Tensor] = inputs) -> Tensor:
            return method.module(**inputs)["loss"]

        def before(step: int, phase: Phase = phase) -> None:
            phase.before_step(step, 100)

        def after(step: int, phase: Phase = phase) -> None:
            phase.after_step(step, 100)

        yield phase, _stepper(bench, loss_of, optimizer, before, after)
        phase.finish()
        phase.loaded()


def _batch(bench: Bench, phase: Phase, rows: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(1000, 30000, (rows, length), device=bench.device)
    if phase.data == "task":
        labels = torch.arange(rows, device=bench.device) % 2
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    labels = torch.full_like(ids, -100)
    if phase.masking:
        labels[:, ::7] = ids[:, ::7]
        ids = ids.masked_fill(labels != -100, 103)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _main_job(bench: Bench, steps: int, shape: str) -> None:
    """`python -m sparsebert.train --method adapt_prune`, on the given model and task or on made-up ones."""
    if importlib.util.find_spec("datasets") is None:
        raise Skip("datasets is not installed, which the command needs; the steps below need it not")
    from sparsebert.train import main

    with tempfile.TemporaryDirectory(prefix="sparsebert-train-") as name:
        folder = Path(name)
        model, task = bench.options.get("model"), bench.options.get("data_dir")
        words = ["--task", "custom", "--text-columns", "text", "--label-column", "label"]
        if model is None or task is None:
            model, task = model or made_model(folder / "model", shape), task or made_task(folder / "task")
        output = folder / "run"
        begun = time.perf_counter()
        status = main([
            "--method", "adapt_prune", "--sparsity", "0.5", "--model", str(model), "--data-dir", str(task), *words,
            "--max-steps", str(steps), "--precision", "bf16" if bench.cuda else "fp32", "--save-strategy", "no",
            "--per-device-train-batch-size", "32", "--output", str(output),
        ])  # fmt: skip
        if status:
            raise Red(f"the command ended with status {status}")
        result = json.loads((output / "result.json").read_text(encoding="utf-8"))
    facts = {"steps": steps, "seconds, all told": round(time.perf_counter() - begun, 1)}
    facts |= {name: result[name] for name in ("metrics", "sparsity", "seconds", "steps_per_second") if name in result}
    bench.facts({"model": Path(model).name, "task": Path(task).name}, facts)


WORDS = ("good", "bad", "fine", "poor", "great", "awful", "nice", "dull", "the", "film", "plot", "was", "very", "and")


def made_model(folder: Path, shape: str) -> Path:
    """A random BERT with a tokenizer of a few words, as transformers saves them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    inner = Tokenizer(models.WordPiece({word: index for index, word in enumerate(names)}, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    marks = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    torch.manual_seed(0)
    BertModel(BertConfig(**steps.SHAPES[shape], vocab_size=len(names))).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=inner, mask_token="[MASK]", **marks).save_pretrained(folder)
    return folder


def made_task(folder: Path, train: int = 2048, validation: int = 256) -> Path:
    """Sentences with a good or a bad word, labelled so; all different."""
    folder.mkdir(parents=True)
    number = 0
    for split, rows in (("train", train), ("validation", validation)):
        lines = ["text\tlabel"]
        for row in range(rows):
            rest = [WORDS[8 + number // 6**place % 6] for place in range(6)]
            lines.append(f"{' '.join(rest)} {WORDS[row % 2 + 2 * (number % 4)]}\t{row % 2}")
            number += 1
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
