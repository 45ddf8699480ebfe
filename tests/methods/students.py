"""A student and a teacher of any sizes, in place of `tiny.build`'s two of one size."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from transformers import AutoModel, PreTrainedModel

from sparsebert.methods import METHODS, Context, Method
from sparsebert.models.task_model import TaskModel
from sparsebert.patterns import parse_pattern


def model(kind: str = "bert", seed: int = 0, layers: int = 2, width: int = 16, heads: int = 4) -> PreTrainedModel:
    """A random model in eval mode."""
    if kind == "distilbert":
        sizes = {"n_layers": layers, "dim": width, "n_heads": heads}
    else:
        sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    config = tiny.config(kind)
    for name, value in sizes.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = AutoModel.from_config(config, attn_implementation="sdpa")
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def pair(
    name: str,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    task: str = "classification",
    dropout: bool = True,
    seed: int = 0,
    **settings: Any,
) -> Method:
    """A method that distils `teacher` into `student`; all of the student's layers, unless the settings say otherwise.

    Args:
        name: of the method.
        student, teacher: bases.
        task: kind of the task, of 2 labels.
        dropout: whether the student has any.
        seed: of the run.
        settings: of the method.
    """
    method = METHODS[name]
    given = method.Settings(**{"student_layers": -1, **settings})
    method.shape(student, given)
    models = [TaskModel(base, task, 2, head="linear", seed=number) for number, base in enumerate((student, teacher))]
    if not dropout:
        for module in models[0].modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    context = Context(
        model=models[0],
        matrices=[],
        pattern=parse_pattern("unstructured"),
        sparsity=0.0,
        allocation="global",
        dtype=torch.float32,
        seed=seed,
        teacher=models[1].eval(),
    )
    return method(context, given)


def batch(rows: int = 4, length: int = 6, task: str = "classification", seed: int = 0) -> dict[str, torch.Tensor]:
    """Random words, each row but the first with padding, and answers for the kind of task."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, len(tiny.WORDS), (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, length - row % (length - 2) :] = 0
    made = {"input_ids": ids * mask, "attention_mask": mask}
    if task == "span":
        return {**made, "start_positions": torch.ones(rows).long(), "end_positions": torch.full((rows,), 2)}
    labels = ids[:, 0] % 2
    return {**made, "labels": labels.float() if task == "regression" else labels}
