"""Distillation steps to time: the terms of `sparsebert.methods.distilling`, and the same losses written out on maps and
states that the models return, as the papers' codes do.

Run as a script, takes a few steps of one kind and prints the peak resident memory above that of a plain fine-tuning
step's: one process a kind, since a process's peak never falls.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from benchmarks.steps import SHAPES, peak_memory
from sparsebert.methods.distilling import AttentionMSE, Distillation, Hidden, Labels, Logits
from sparsebert.models.task_model import TaskModel

KINDS = ("distill", "eager", "finetune")
TEMPERATURE = 2.0


def make_step(
    kind: str, shape: str, batch: int, seq: int, dtype: torch.dtype, device: str = "cpu", attention: str = "eager"
) -> Callable[[], Tensor]:
    """A function that takes one step, forward to optimiser, on random tokens `[batch, seq]` and returns the loss.

    Teacher and student have the same shape; sequences hold from half of to all `seq` tokens.
    """
    torch.manual_seed(0)
    models = [_model(shape, attention).to(device) for _ in range(1 if kind == "finetune" else 2)]
    student, teacher = models[0], models[-1]
    inputs = {name: tensor.to(device) for name, tensor in _inputs(batch, seq).items()}
    layers = range(1, SHAPES[shape]["num_hidden_layers"] + 1)
    pairs = [(layer, layer) for layer in layers]
    objective: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    if kind == "distill":
        terms = [Logits(TEMPERATURE), Labels(), Hidden([(0, 0), *pairs]), AttentionMSE(pairs)]
        objective = Distillation(student, teacher, terms)
    elif kind == "eager":
        objective = _Eager(student, teacher.requires_grad_(False).eval())
    else:
        objective = lambda batch: student(**batch)  # noqa: E731
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    student.train()

    def step() -> Tensor:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            loss = objective(inputs)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _model(shape: str, attention: str) -> TaskModel:
    # Without dropout both kinds compute the same numbers, which the benchmark checks first.
    base = BertModel(
        BertConfig(
            **SHAPES[shape], attn_implementation=attention, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
    )
    model = TaskModel(base, "classification", 3, head="linear", seed=0)
    model.head.dropout.p = 0.0
    return model


def _inputs(batch: int, seq: int) -> dict[str, Tensor]:
    lengths = torch.linspace(seq // 2, seq, batch).long()
    mask = (torch.arange(seq)[None] < lengths[:, None]).long()
    return {
        "input_ids": torch.randint(1000, 30000, (batch, seq)),
        "attention_mask": mask,
        "labels": torch.arange(batch) % 3,
    }


class _Eager:
    """The losses on returned maps and states, layer by layer, padding left out by multiplication."""

    def __init__(self, student: TaskModel, teacher: TaskModel) -> None:
        self.student, self.teacher = student, teacher

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            t_out, t_logits = self._run(self.teacher, batch)
        s_out, s_logits = self._run(self.student, batch)
        mask = batch["attention_mask"].float()
        tokens, pairs = mask.sum(), mask.sum(-1).square().sum()
        losses: list[Tensor] = []
        for s, t in zip(s_out.hidden_states, t_out.hidden_states, strict=True):
            losses.append(((s - t).float().square() * mask[:, :, None]).sum() / (tokens * s.shape[-1]))
        hidden = torch.stack(losses).mean()
        keep = mask[:, None, :, None] * mask[:, None, None, :]
        maps = [
            ((s - t).float().square() * keep).sum() / (pairs * s.shape[1])
            for s, t in zip(s_out.attentions, t_out.attentions, strict=True)
        ]
        soft = F.kl_div(
            F.log_softmax(s_logits / TEMPERATURE, -1), F.softmax(t_logits / TEMPERATURE, -1), reduction="batchmean"
        )
        hard = F.cross_entropy(s_logits, batch["labels"])
        return {"loss": soft * TEMPERATURE**2 + hard + hidden + torch.stack(maps).mean()}

    def _run(self, model: TaskModel, batch: dict[str, Tensor]) -> tuple[Any, Tensor]:
        output = model.base(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_attentions=True,
            output_hidden_states=True,
        )  # fmt: skip
        return output, model.head(output.pooler_output)


def main(kind: str, shape: str, batch: int, seq: int, dtype: str) -> None:
    """Prints how far the peak resident memory rises above that of the imports, in bytes."""
    before = peak_memory()
    step = make_step(kind, shape, batch, seq, getattr(torch, dtype))
    for _ in range(4):
        step()
    print(peak_memory() - before)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
