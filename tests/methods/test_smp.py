"""Static model pruning: frozen weights, a mask by first-order scores, a teacher."""

from __future__ import annotations

from itertools import pairwise

import pytest
import tiny
import torch

from sparsebert.methods import METHODS
from sparsebert.methods.gmp import cubic_sparsity
from sparsebert.patterns import units_to_prune


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4", "neurons", "heads"])
def test_only_scores_and_head_are_trained_in_a_base_without_dropout(pattern: str) -> None:
    method = tiny.build("smp", pattern)
    (phase,) = method.phases()
    phase.start()
    scores, head = phase.parameter_groups(1e-3)
    assert (scores["lr"], scores["weight_decay"], head["lr"]) == (2e-2, 0.0, 1e-3)
    assert not any(parameter.requires_grad for parameter in method.context.model.base.parameters())
    phase.loaded()
    method.module.train()
    ids = torch.randint(5, 20, (2, 5))
    states = [method.context.model.base(input_ids=ids).last_hidden_state for _ in range(2)]
    assert torch.equal(*states)


def test_pruning_begins_at_once_and_units_come_back() -> None:
    method = tiny.build("smp", sparsity=0.6)
    levels: list[float] = []
    masks: list[torch.Tensor] = []

    def watch(phase: object, step: int) -> None:
        levels.append(method.masks.sparsity())
        masks.append(torch.cat([unit.flatten() for unit in method.masks.units()]))

    tiny.by_hand(method, 20, watch)
    total = method.masks.counts()[1]
    wanted = [cubic_sparsity(step / 12, 0.6) for step in range(21)]
    assert levels == [units_to_prune(level, total) / total for level in wanted]
    assert any(bool((after & ~before).any()) for before, after in pairwise(masks))


def test_a_teacher_is_wanted_unless_told_otherwise() -> None:
    cls = METHODS["smp"]
    assert cls.wants_teacher(cls.Settings()) and not cls.wants_teacher(cls.Settings(kd=False))
    assert tiny.build("smp", kd=False).context.teacher is None


def test_it_learns_from_the_teacher_alone_where_hard_labels_weigh_nothing() -> None:
    method = tiny.build("smp", hard_labels=0.0, temperature=3.0)
    (phase,) = method.phases()
    phase.start()
    phase.loaded()
    method.module.train()
    method.context.model.head.eval()
    batch = tiny.batch(phase, 8)
    teacher = method.context.teacher
    assert teacher is not None
    with torch.no_grad():
        soft = (teacher(batch["input_ids"])["logits"] / 3.0).softmax(-1)
        mine = (method.context.model(batch["input_ids"])["logits"] / 3.0).log_softmax(-1)
    loss = method.module(**batch)["loss"]
    torch.testing.assert_close(loss.detach(), -9.0 * (soft * mine).sum(-1).mean())
