"""Sparse Progressive Distillation: the schedule ends at 1, the loss is the sum it says, the student's layers learn."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods.grafts import batch, make, without_dropout
from torch import Tensor
from torch.nn import functional as F
from training.breaks import Breaks, PowerCut, assert_same

from sparsebert.methods import Method, Phase
from sparsebert.methods.grafting import SCHEDULES, GraftSettings, graft_probability
from sparsebert.models.capture import layers_of
from sparsebert.models.graft import grafted
from sparsebert.models.task_model import TaskModel
from sparsebert.patterns import units_to_prune
from sparsebert.train import main

SHARES = st.floats(0, 1)


@given(st.sampled_from(SCHEDULES), st.floats(0.01, 1), st.floats(0.02, 1), SHARES, st.lists(SHARES))
def test_every_schedule_rises_from_its_first_probability_to_one(
    schedule: Any, first: float, until: float, hold: float, places: list[float]
) -> None:
    settings = GraftSettings(first, schedule, hold * until * 0.99, until)
    assert graft_probability(settings, 0.0) == first
    assert graft_probability(settings, until) == graft_probability(settings, 1.0) == 1.0
    levels = [graft_probability(settings, place) for place in sorted(places)]
    assert levels == sorted(levels)
    before = until * 0.999
    assert schedule != "constant" or graft_probability(settings, before) == first


def test_linear_and_mixed_schedules_in_between() -> None:
    linear = GraftSettings(0.4, "linear", graft_until=0.5)
    assert graft_probability(linear, 0.25) == pytest.approx(0.7)
    mixed = GraftSettings(0.4, "mixed", graft_hold=0.2, graft_until=0.6)
    assert [graft_probability(mixed, done) for done in (0.1, 0.2, 0.4, 0.5)] == pytest.approx([0.4, 0.4, 0.7, 0.85])


def follow(method: Method, steps: int) -> dict[str, list[list[bool]]]:
    """What was drawn in each forward pass, by phase."""
    drawn: dict[str, list[list[bool]]] = {}
    for phase in method.phases():
        draw = phase.draw  # type: ignore[attr-defined]
        seen = drawn.setdefault(phase.name, [])
        phase.draw = lambda draw=draw, seen=seen: seen.append(draw()) or seen[-1]  # type: ignore[attr-defined]
        one = phase
        method.phases = lambda one=one: [one]  # type: ignore[method-assign]
        tiny.by_hand(method, steps)
    return drawn


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [2, 3, 30])
def test_the_last_steps_are_the_students_alone(schedule: str, steps: int) -> None:
    method = tiny.build("spd", graft_schedule=schedule, graft_probability=0.3)
    drawn = follow(method, steps)
    assert len(drawn["prune"]) == len(drawn["graft"]) == steps
    alone = [all(own) for own in drawn["graft"]]
    assert alone[-1]
    if steps == 30:
        assert all(alone[21:]) and not all(alone[:20])
        assert not all(all(own) for own in drawn["prune"])


def test_the_student_prunes_alone_if_so_asked() -> None:
    drawn = follow(tiny.build("spd", graft_probability=0.1, graft_while_pruning=False), 5)
    assert all(all(own) for own in drawn["prune"])
    assert not all(all(own) for own in drawn["graft"])


def test_draws_follow_the_probability_each_layer_for_itself() -> None:
    method = tiny.build("spd", graft_probability=0.7)
    phase: Any = method.phases()[0]
    phase.start()
    drawn = torch.tensor([phase.draw() for _ in range(3000)])
    # Of 2 layers, none would be the student's in 9 % of the passes: then one of the two is.
    assert drawn.any(1).all()
    assert drawn.float().mean(0).tolist() == pytest.approx([0.745, 0.745], abs=0.03)
    assert float(drawn.all(1).float().mean()) == pytest.approx(0.49, abs=0.03)
    method.module.memory[0] = 100.0  # as a checkpoint would put it
    assert [phase.draw() for _ in range(50)] == drawn[100:150].tolist()


def of_layers(model: TaskModel) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in layers_of(model.base).named_parameters()}


def outside(model: TaskModel) -> dict[str, Tensor]:
    """All that is in no layer, head included."""
    return {name: weight.detach().clone() for name, weight in model.state_dict().items() if ".layer." not in name}


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("task", ["classification", "regression", "span"])
def test_the_students_layers_learn_and_all_else_is_the_teachers(kind: str, task: str) -> None:
    method = make("spd", task, kind)
    teacher = method.context.teacher
    assert teacher is not None
    theirs = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    for phase in method.phases():
        phase.start()
        optimizer = torch.optim.AdamW(phase.parameter_groups(1e-3), lr=1e-3, weight_decay=0.0)
        phase.loaded()
        method.module.train()
        for step in range(1, 5):
            optimizer.zero_grad()
            method.module(**batch(task, step))["loss"].backward()
            optimizer.step()
            phase.after_step(step, 4)
        phase.finish()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in teacher.state_dict().items())
    learnt, same = of_layers(method.context.model), outside(method.context.model)
    before = of_layers(teacher)
    assert same.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in same.items())
    assert not [name for name, weight in learnt.items() if torch.equal(weight, before[name])]
    assert method.masks.sparsity() == 0.5


def by_formula(method: Method, own: tuple[bool, bool], task: str, weights: dict[str, float]) -> Tensor:
    """The loss, from states and maps written out."""
    given_ = batch(task)
    model, teacher = method.context.model, method.context.teacher
    assert teacher is not None
    ids, mask = given_["input_ids"], given_["attention_mask"]
    keep = mask.bool()
    options = {"output_hidden_states": True, "output_attentions": True}
    for one in (model, teacher):
        one.base.set_attn_implementation("eager")
        one.encode(ids, mask, **options)  # transformers puts its hooks where it finds the layers in the first call
    their = teacher.encode(ids, mask, **options)
    with grafted(model.base, teacher.base, own):
        mine = model.encode(ids, mask, **options)
    hidden = sum(
        F.mse_loss(a[keep], b[keep]) for a, b in zip(mine.hidden_states[1:], their.hidden_states[1:], strict=True)
    )
    pairs = (keep[:, :, None] & keep[:, None, :])[:, None].expand(-1, 4, -1, -1)
    maps = sum(F.mse_loss(a[pairs], b[pairs]) for a, b in zip(mine.attentions, their.attentions, strict=True))
    student, target = (one.answer(output, mask) for one, output in ((model, mine), (teacher, their)))
    if task == "regression":
        soft = F.mse_loss(student["logits"], given_["labels"])
    else:
        names = ("start_logits", "end_logits") if task == "span" else ("logits",)
        soft = sum(
            -(target[name].softmax(-1) * student[name].log_softmax(-1)).sum(-1).mean() / len(names) for name in names
        )
        soft = soft / 2
    return weights["hidden"] * hidden + weights["attention"] * maps + weights["soft_label"] * soft  # type: ignore[return-value]


@pytest.mark.parametrize("task", ["classification", "regression", "span"])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 3.0)])
@pytest.mark.parametrize("own", [(True, False), (False, True), (True, True)])
def test_the_loss_is_the_sum_over_layers_of_the_grafted_network(
    task: str, weights: tuple[float, float, float], own: tuple[bool, bool]
) -> None:
    named = dict(zip(("hidden", "attention", "soft_label"), weights, strict=True))
    method = without_dropout(make("spd", task, **{f"{name}_weight": value for name, value in named.items()}))
    phase: Any = method.phases()[1]
    method.inherit()  # type: ignore[attr-defined]
    phase.start()
    masks = method.masks
    masks.select(masks.magnitude(), 0.5, "matrix")
    phase.draw = lambda: list(own)
    with torch.no_grad():
        found = method.module(**batch(task))["loss"]
        expected = by_formula(method, own, task, named)
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


def test_an_unpruned_copy_has_nothing_to_learn_but_the_teachers_uncertainty() -> None:
    method = make("spd", soft_label_weight=0.0, dropout=False)
    phase = method.phases()[0]
    phase.start()
    phase.loaded()
    assert float(method.module(**batch())["loss"].detach()) == pytest.approx(0.0, abs=1e-8)
    assert method.module.objective is not None
    phase.finish()
    assert method.module.objective is None


def test_the_mask_grows_while_pruning_and_stays_while_grafting() -> None:
    method, steps = tiny.build("spd", sparsity=0.8, allocation="matrix"), 20
    total = method.masks.counts()[1]
    levels: dict[str, list[float]] = {}
    units: list[list[Tensor]] = []

    def watch(phase: Phase, step: int) -> None:
        levels.setdefault(phase.name, []).append(phase.logs()["sparsity"])
        units.append(method.masks.units())
        for name, mask in method.masks.dense().items():
            assert bool((method.masks.weights()[name][~mask] == 0).all()), (phase.name, step)

    tiny.by_hand(method, steps, watch)
    for before, after in pairwise(units):
        assert not any(bool((new & ~old).any()) for old, new in zip(before, after, strict=True))
    assert levels["prune"][0] == 0.0 and levels["prune"] == sorted(levels["prune"])
    assert levels["prune"][18:] == levels["graft"][:3] == [levels["graft"][-1]] * 3
    assert 9 <= len(set(levels["prune"])) <= 12
    assert method.masks.counts()[0] == sum(units_to_prune(0.8, unit.numel()) for unit in units[-1])
    assert total == sum(unit.numel() for unit in units[-1])


def test_masked_embeddings_and_pooler_learn_too() -> None:
    method = tiny.build("spd", masked=("encoder", "word_embeddings", "pooler"))
    theirs = method.context.teacher.state_dict()  # type: ignore[union-attr]
    tiny.by_hand(method, 4)
    mine = method.context.model.state_dict()
    kept = {f"base.{name}.weight": mask for name, mask in method.masks.dense().items()}
    for name in ("base.embeddings.word_embeddings.weight", "base.pooler.dense.weight"):
        assert not torch.equal(mine[name][kept[name]], theirs[name][kept[name]])
    assert torch.equal(
        mine["base.embeddings.position_embeddings.weight"], theirs["base.embeddings.position_embeddings.weight"]
    )
    assert torch.equal(mine["head.output.weight"], theirs["head.output.weight"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_it_trains_in_bf16(attention: str) -> None:
    method = make("spd", dtype=torch.bfloat16)
    for model in (method.context.model, method.context.teacher):
        model.base.set_attn_implementation(attention)  # type: ignore[union-attr]
    phase: Any = method.phases()[0]
    phase.start()
    phase.loaded()
    for own in ([True, False], [False, True], [True, True]):
        phase.draw = lambda own=own: own
        with torch.autocast("cpu", torch.bfloat16):
            loss = method.module(**batch())["loss"]
        assert loss.dtype == torch.float32
        loss.backward()
    weights = phase.trained()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in weights)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEBERT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tiny.Workshop(tmp_path_factory.mktemp("workshop"))


TEACHER = ("--teacher-max-steps", "3")


def test_the_command_leaves_a_pruned_student_with_the_teachers_head(workshop: tiny.Workshop) -> None:
    from safetensors.torch import load_file

    teacher = workshop.run("finetune", "--head", "linear", steps=6)
    outcome = workshop.run("spd", "--teacher", str(teacher.folder), "--sparsity", "0.75", "--seed", "3", steps=9)
    outcome.check_zeros()
    assert outcome.pruned() == (3072, 4096)
    assert [phase["phase"] for phase in outcome.result["phases"]] == ["prune", "graft"]
    assert outcome.result["teacher"]["score"] == teacher.result["score"]
    assert outcome.numbers("graft_probability", "prune") == [0.8] * 9
    risen = outcome.numbers("graft_probability", "graft")
    assert risen == sorted(risen) and risen[-3:] == [1.0] * 3 and risen[0] < 0.9
    for name in ("pooler.dense.weight", "embeddings.LayerNorm.bias", "embeddings.word_embeddings.weight"):
        assert torch.equal(outcome.after[name], teacher.after[name])
    heads = [load_file(run.folder / "model" / "head.safetensors") for run in (outcome, teacher)]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[1])


def test_a_broken_run_goes_on_to_the_last_bit(workshop: tiny.Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*TEACHER, "--save-strategy", "steps", "--save-steps", "2", "--graft-probability", "0.5",
             "--gradient-accumulation-steps", "2"]  # fmt: skip
    straight = workshop.run("spd", *words, steps=5).folder
    command = workshop.command("spd", *words, steps=5)
    folder = command[command.index("--output") + 1]
    breaks = Breaks(monkeypatch)
    breaks.signal_at("prune", 4)
    assert main(command) == 130
    breaks.cut_at("graft", 4)
    with pytest.raises(PowerCut):
        main(["--resume", folder])
    breaks.tear_at("graft", 4)
    with pytest.raises(PowerCut):
        main(["--resume", folder])
    assert main(["--resume", folder]) == 0
    assert_same(straight, Path(folder))


def test_a_teacher_of_another_shape_is_refused(workshop: tiny.Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = workshop.run("finetune", "--head", "mlp", steps=1)
    assert main(workshop.command("spd", "--teacher", str(teacher.folder))) == 2
    assert "expected the student's head, linear, got mlp" in capsys.readouterr().err
