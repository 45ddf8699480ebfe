"""`--kd`: soft labels beside hard ones, for methods that do without."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch.nn import functional as F

from sparsebert.methods import METHODS, Method, Phase

NAMES = ("gmp", "imp", "magnitude", "movement", "random", "soft_movement")


def expected_loss(method: Method, phase: Phase, batch: dict[str, torch.Tensor], hard: float, t: float) -> torch.Tensor:
    """The published loss in plain torch."""
    assert method.context.teacher is not None
    with torch.no_grad():
        mine, theirs = (model(batch["input_ids"])["logits"] for model in (method.context.model, method.context.teacher))
    soft = -(F.softmax(theirs / t, -1) * F.log_softmax(mine / t, -1)).sum(-1).mean() * t * t
    return hard * F.cross_entropy(mine, batch["labels"]) + (1.0 - hard) * soft


@pytest.mark.parametrize("weights", ["trained", "pretrained"])
@pytest.mark.parametrize("name", NAMES)
def test_all_phases_but_the_comparison_learn_from_the_teacher(name: str, weights: str) -> None:
    method = tiny.build(name, kd=True, hard_labels=0.3, temperature=4.0, untouched=True, weights=weights)
    assert method.context.teacher is not None
    before = {key: tensor.clone() for key, tensor in method.context.teacher.state_dict().items()}
    seen: list[str] = []

    def watch(phase: Phase, step: int) -> None:
        if step != 1:
            return
        method.module.train()
        method.context.model.base.eval()
        method.context.model.head.eval()
        batch = tiny.batch(phase, 8)
        loss = method.module(**batch)["loss"].detach()
        if phase.name == "untouched":
            torch.testing.assert_close(loss, method.context.model(**batch)["loss"].detach())
        else:
            torch.testing.assert_close(loss, expected_loss(method, phase, batch, 0.3, 4.0))
            assert phase.logs().keys() >= {"labels_loss", "logits_loss"}
        seen.append(phase.name)

    tiny.by_hand(method, 2, watch)
    assert seen[0] == "untouched" and len(seen) >= 2
    assert method.module.objective is None
    assert all(torch.equal(tensor, before[key]) for key, tensor in method.context.teacher.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_without_it_there_is_no_teacher_and_the_loss_is_the_tasks(name: str) -> None:
    cls = METHODS[name]
    assert not cls.wants_teacher(cls.Settings()) and cls.wants_teacher(cls.Settings(kd=True))
    method = tiny.build(name)
    for phase in method.phases():
        phase.start()
        assert method.module.objective is None
        phase.loaded()
        phase.finish()


def test_the_model_is_scored_on_the_task_alone() -> None:
    method = tiny.build("magnitude", kd=True)
    (phase,) = method.phases()
    phase.start()
    phase.loaded()
    method.module.eval()
    batch = tiny.batch(phase, 8)
    assert torch.equal(method.module(**batch)["loss"], method.context.model(**batch)["loss"])


def test_a_phase_that_is_started_again_forgets_the_last_ones_teacher() -> None:
    method = tiny.build("gmp", kd=True, untouched=True)
    untouched, prune = method.phases()
    prune.start()
    assert method.module.objective is not None
    untouched.start()
    assert method.module.objective is None


@pytest.mark.parametrize("name", ["gmp", "movement"])
def test_the_command_trains_a_teacher_and_says_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path / "cache"))
    shop = tiny.Workshop(tmp_path)
    with_teacher = shop.run(name, "--kd", "--teacher-max-steps", "3", "--no-untouched", steps=3)
    without = shop.run(name, "--no-untouched", steps=3)
    assert with_teacher.result["teacher"]["method"] == "finetune" and "teacher" not in without.result
    assert len(with_teacher.numbers("logits_loss", "prune")) == 3 and not without.numbers("logits_loss", "prune")
    assert any(not torch.equal(tensor, without.after[key]) for key, tensor in with_teacher.after.items())
    with_teacher.check_zeros()
