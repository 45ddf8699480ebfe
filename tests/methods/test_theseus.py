"""BERT-of-Theseus: one layer takes the place of several, then the student is fine-tuned alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from methods.grafts import batch, make, without_dropout
from torch import Tensor
from training.breaks import Breaks, assert_same

from sparsebert.methods import Phase
from sparsebert.models.capture import layers_of
from sparsebert.models.graft import grafted
from sparsebert.train import main


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_layers_learn_first_then_all_of_the_student(kind: str) -> None:
    method = tiny.build("theseus", kind=kind)
    student, teacher = method.context.model, method.context.teacher
    assert teacher is not None
    theirs = state(teacher)
    seen: dict[tuple[str, int], dict[str, Tensor]] = {}

    def watch(phase: Phase, step: int) -> None:
        seen[phase.name, step] = state(student)

    tiny.by_hand(method, 4, watch)
    assert len(layers_of(student.base)) == 1 and len(layers_of(teacher.base)) == 2
    first = seen["replace", 0]
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in first.items())
    changed = {name for name, tensor in seen["replace", 4].items() if not torch.equal(tensor, first[name])}
    assert changed == {name for name in first if ".layer." in name}
    before = seen["finetune", 0]
    assert all(torch.equal(tensor, seen["replace", 4][name]) for name, tensor in before.items())
    after = seen["finetune", 4]
    assert not torch.equal(after["head.output.weight"], before["head.output.weight"])
    table = "base.embeddings.word_embeddings.weight"
    assert not torch.equal(after[table], before[table])
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in teacher.state_dict().items())


@pytest.mark.parametrize("task", ["classification", "regression", "span"])
@pytest.mark.parametrize("own", [True, False])
def test_the_loss_is_the_tasks_own_of_the_grafted_network(task: str, own: bool) -> None:
    method = without_dropout(make("theseus", task))
    student, teacher = method.context.model, method.context.teacher
    assert teacher is not None
    phase: Any = method.phases()[0]
    phase.start()
    phase.draw = lambda: [own]
    found = method.module(**batch(task))["loss"]
    with grafted(student.base, teacher.base, [own]):
        assert float(student(**batch(task))["loss"].detach()) == pytest.approx(float(found.detach()), rel=1e-6)
    if not own:
        assert float(teacher(**batch(task))["loss"]) == pytest.approx(float(found.detach()), rel=1e-6)
    method.module.eval()
    alone = student(**batch(task))["loss"]
    assert torch.equal(method.module(**batch(task))["loss"], alone)


def test_the_probability_rises_to_one() -> None:
    method = tiny.build("theseus", graft_probability=0.2)
    levels: dict[str, list[float]] = {}

    def watch(phase: Phase, step: int) -> None:
        if phase.name == "replace":
            levels.setdefault(phase.name, []).append(phase.logs()["graft_probability"])

    tiny.by_hand(method, 10, watch)
    expected = [0.2 + 0.8 * step / 10 for step in range(9)] + [1.0, 1.0]
    assert levels["replace"] == pytest.approx(expected)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEBERT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tiny.Workshop(tmp_path_factory.mktemp("workshop"))


def test_a_broken_run_goes_on_to_the_last_bit(workshop: tiny.Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--teacher-max-steps", "3", "--save-strategy", "steps", "--save-steps", "2"]
    straight = workshop.run("theseus", *words, steps=5)
    assert [phase["phase"] for phase in straight.result["phases"]] == ["replace", "finetune"]
    assert straight.masks == {} and straight.result["pattern"] is None
    assert max(int(name.split(".")[2]) for name in straight.after if ".layer." in name) == 0
    command = workshop.command("theseus", *words, steps=5)
    folder = command[command.index("--output") + 1]
    breaks = Breaks(monkeypatch)
    breaks.signal_at("replace", 3)
    assert main(command) == 130
    breaks.signal_at("finetune", 4)
    assert main(["--resume", folder]) == 130
    assert main(["--resume", folder]) == 0
    assert_same(straight.folder, Path(folder))


def test_a_head_on_all_layers_is_refused(workshop: tiny.Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(workshop.command("theseus", "--head", "mlp")) == 2
    assert "head mlp" in capsys.readouterr().err
