"""What a step of training must not do on a GPU: wait for it. The meta device has no numbers to read."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tiny
import torch
from methods import students

from sparsebert.methods.distilling import (
    AttentionKL,
    AttentionMSE,
    Distillation,
    Hidden,
    Labels,
    Logits,
    Relations,
    Term,
    projection,
)
from sparsebert.models.task_model import TaskModel

EVERY = [(1, 1), (2, 2)]


def test_the_memory_stays_on_the_cpu() -> None:
    module = tiny.build("movement", "unstructured", 0.5).module
    memory = module.memory
    memory[0] = 3.25
    for moved in (module.half(), module.to("meta")):
        assert moved is module and module.memory is memory
        assert memory.device.type == "cpu" and memory.dtype == torch.float64 and memory[0] == 3.25
    assert next(module.parameters()).device.type == "meta"
    assert "memory" in module.state_dict()


@pytest.mark.parametrize(
    "terms",
    [
        [Labels(), Logits(2.0), AttentionKL(EVERY), AttentionMSE(EVERY), AttentionMSE(EVERY, on="scores")],
        [Hidden(EVERY, "mse"), Hidden(EVERY, "cosine", padding=True), Relations(EVERY, heads=2)],
        [Hidden(EVERY, "mse", project=projection(16, 16, 0))],
    ],
)
def test_a_step_reads_no_number(terms: Sequence[Term]) -> None:
    student, teacher = (TaskModel(students.model(seed=seed), "classification", 2, head="linear") for seed in (0, 1))
    batch = {name: tensor.to("meta") for name, tensor in students.batch().items()}
    # Told so, transformers looks at no mask either.
    del batch["attention_mask"]
    for module in (student, teacher, *(term.trained() for term in terms)):
        if module is not None:
            module.to("meta")
    outcome = Distillation(student, teacher, terms)(batch)
    outcome["loss"].backward()
    assert outcome["loss"].device.type == "meta"
    assert any(parameter.grad is not None for parameter in student.parameters())
