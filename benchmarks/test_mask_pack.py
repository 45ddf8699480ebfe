"""Many tasks beside one BERT-base: switching between them in place, and a batch whose rows belong to several.

Random weights in BERT-base's shapes, random masks that keep half, fp32. `eager where` makes the same product with torch
from bool masks (8 bits a weight); `copies` copies from a dense model kept for each task (32 bits a weight). A batch has
one sentence of 128 random tokens a row, its rows dealt to the tasks in turn: `one pass` against each task switched to
and run on its own rows, and against the same batch all of the task that runs already.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

import sparsebert
from sparsebert.models.prunable import prunable_matrices
from sparsebert.models.task_model import TaskModel
from sparsebert.ops.bits import unpack_bits

LENGTH, ROWS = 128, 8


def build(tasks: int, masked: tuple[str, ...]) -> sparsebert.MaskPack:
    """A pack in memory alone: its files are not what is measured."""
    pack = sparsebert.MaskPack(Path("nowhere"), BertModel(BertConfig()).eval(), None, "")  # type: ignore[arg-type]
    for number in range(tasks):
        for matrix in prunable_matrices(pack.base, masked):
            size = (matrix.shape[0] * matrix.shape[1] + 7) // 8
            pack._pack(matrix.name).bits[f"task{number}"] = torch.randint(0, 256, (size,), dtype=torch.uint8)
        pack._models[f"task{number}"] = TaskModel(pack.base, "classification", 2, head="linear").eval()
    return pack.requires_grad_(False)


@pytest.mark.parametrize("masked", ["encoder", "encoder and embeddings"])
def test_switch(bench: Any, masked: str) -> None:
    pack = build(2, tuple(masked.split(" and ")))
    layers, turn = list(pack._packed.values()), [0]
    masks = [[unpack_bits(bits, layer.full.shape) for bits in layer.bits.values()] for layer in layers]
    dense = [[layer.full * mask for mask in kept] for layer, kept in zip(layers, masks, strict=True)]
    # No speed is reported on a wrong result.
    for number, task in enumerate(pack.tasks):
        pack.switch(task)
        assert all(torch.equal(layer.weight, kept[number]) for layer, kept in zip(layers, dense, strict=True))

    def switch() -> None:
        turn[0] ^= 1
        pack.switch(pack.tasks[turn[0]])

    def where() -> None:
        turn[0] ^= 1
        for layer, kept in zip(layers, masks, strict=True):
            layer.weight.copy_(torch.where(kept[turn[0]], layer.full, 0.0))

    def copies() -> None:
        turn[0] ^= 1
        for layer, kept in zip(layers, dense, strict=True):
            layer.weight.copy_(kept[turn[0]])

    timings = bench.interleave({"switch": switch, "eager where": where, "copies": copies})
    weights = sum(layer.full.numel() for layer in layers)
    case = {"masked": masked, "M weights": round(weights / 1e6, 1), "MB a task": round(weights / 8e6, 1)}
    bench.row("mask_pack_switch", case, timings, "switch")


@pytest.mark.parametrize("tasks", [1, 2, 4, 8])
def test_mixed_batch(bench: Any, full: bool, tasks: int) -> None:
    if not full and tasks != 4:
        pytest.skip("one of the cells of --full")
    pack = build(tasks, ("encoder",))
    inputs = {"input_ids": torch.randint(1000, 30000, (ROWS, LENGTH))}
    dealt = [pack.tasks[row % tasks] for row in range(ROWS)]
    rows = {task: {"input_ids": inputs["input_ids"][place::tasks]} for place, task in enumerate(pack.tasks)}
    pack.switch(None)

    def apart() -> list[Any]:
        found = [pack(part, tasks=task)["logits"] for task, part in rows.items()]
        pack.switch(None)
        return found

    with torch.inference_mode():
        mixed, own = pack(inputs, tasks=dealt), apart()
        for row in range(ROWS):
            torch.testing.assert_close(mixed[row]["logits"], own[row % tasks][row // tasks], rtol=1e-5, atol=1e-5)
        pack.switch("task0")
        timings = bench.interleave({"one task": lambda: pack(inputs)})
        pack.switch(None)
        timings |= bench.interleave({"one pass": lambda: pack(inputs, tasks=dealt), "apart": apart})
    bench.row("mask_pack_batch", {"tasks": tasks, "rows": ROWS, "S": LENGTH}, timings, "one pass")
