"""What a step of training must not do on a GPU: wait for it. Fake tensors have no numbers to read."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tiny
import torch
from methods import students
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsebert.methods.distilling import (
    AttentionKL,
    AttentionMSE,
    Distillation,
    Hidden,
    Labels,
    Logits,
    Relations,
    Term,
)
from sparsebert.models.task_model import TaskModel

EVERY = [(1, 1), (2, 2)]


def without_numbers(model: TaskModel, mode: FakeTensorMode) -> TaskModel:
    """The model with fake tensors in the place of its own."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = torch.nn.Parameter(mode.from_tensor(parameter.detach()))
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = mode.from_tensor(buffer)
    return model


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
    ],
)
def test_a_step_reads_no_number(terms: Sequence[Term]) -> None:
    models = [TaskModel(students.model(seed=seed), "classification", 2, head="linear") for seed in (0, 1)]
    mode = FakeTensorMode()
    student, teacher = (without_numbers(model, mode) for model in models)
    with mode:
        batch = {name: mode.from_tensor(tensor) for name, tensor in students.batch().items()}
        # transformers looks whether a mask has any padding, so there is none.
        del batch["attention_mask"]
        loss = Distillation(student, teacher, terms)(batch)["loss"]
        loss.backward()
        assert any(parameter.grad is not None for parameter in student.parameters())
        with pytest.raises(RuntimeError):
            loss.item()
