"""Grafting: the layers that run are the ones asked for, and nothing of it is left afterwards."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from sparsebert.errors import UserError
from sparsebert.models.capture import Capture, Needs, layers_of
from sparsebert.models.cut import keep_first_layers
from sparsebert.models.graft import check_graft, grafted, inherit
from sparsebert.models.task_model import TaskModel

IDS = torch.tensor([[2, 5, 14, 9, 3, 0], [2, 7, 10, 3, 0, 0]])
MASK = (IDS != 0).long()


def model(kind: str = "bert", seed: int = 0, layers: int = 2, head: str = "linear", **more: object) -> TaskModel:
    base = tiny.base(kind, seed)
    keep_first_layers(base, layers)
    return TaskModel(base, "classification", 2, head=head, head_width=8, seed=seed, **more).eval()  # type: ignore[arg-type]


def states(one: TaskModel) -> list[Tensor]:
    """All hidden states, by transformers' own way."""
    with torch.no_grad():
        return list(one.encode(IDS, MASK, output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("own", [(True, True), (False, True), (True, False), (False, False)])
def test_the_layers_that_run_are_those_asked_for(kind: str, own: tuple[bool, bool]) -> None:
    """Against models whose weights are put together by hand."""
    base, donor, expected = model(kind), model(kind, seed=1), model(kind)
    for index, kept in enumerate(own):
        if not kept:
            layers_of(expected.base)[index].load_state_dict(layers_of(donor.base)[index].state_dict())
    with grafted(base.base, donor.base, own):
        found = states(base)
    assert len(found) == 3
    for one, other in zip(found, states(expected), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_nothing_is_left_of_it(kind: str) -> None:
    base, donor = model(kind), model(kind, seed=1)
    before, theirs, names = states(base), states(donor), list(base.state_dict())
    modules, layers = list(base.modules()), layers_of(base.base)
    with pytest.raises(RuntimeError, match="in between"), grafted(base.base, donor.base, (False, True)):
        assert list(base.state_dict()) == names
        raise RuntimeError("in between")
    assert layers_of(base.base) is layers
    assert list(base.modules()) == modules and list(base.state_dict()) == names
    for one, other in zip([*before, *theirs], [*states(base), *states(donor)], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_one_layer_stands_for_several(kind: str) -> None:
    student, teacher = model(kind, layers=1), model(kind, seed=1)
    inherit(student, teacher)
    with grafted(student.base, teacher.base, [False]), torch.no_grad():
        through = student(IDS, MASK)["logits"]
    with torch.no_grad():
        assert torch.equal(through, teacher(IDS, MASK)["logits"])
        assert not torch.equal(student(IDS, MASK)["logits"], through)
    assert len(layers_of(student.base)) == 1


def test_a_student_inherits_all_that_it_has_a_place_for() -> None:
    student, teacher = model(layers=1), model(seed=1)
    inherit(student, teacher)
    theirs = teacher.state_dict()
    assert "head.output.weight" in student.state_dict() and "base.pooler.dense.weight" in student.state_dict()
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, theirs[name])
        assert tensor.data_ptr() != theirs[name].data_ptr()


def test_the_head_on_all_layers_sees_the_grafted_ones() -> None:
    """transformers collects the states by hooks on the layers that it found when it was first asked."""
    base, donor, expected = model(head="mlp"), model(seed=1, head="mlp"), model(head="mlp")
    layers_of(expected.base)[1].load_state_dict(layers_of(donor.base)[1].state_dict())
    with grafted(base.base, donor.base, (True, False)), torch.no_grad():
        logits = base(IDS, MASK)["logits"]
    assert torch.equal(logits, expected(IDS, MASK)["logits"])


def test_states_are_captured_of_the_layers_that_run() -> None:
    base, donor = model(), model(seed=1)
    needs = Needs(hidden=frozenset({0, 1, 2}), attention=frozenset({1, 2}))
    with grafted(base.base, donor.base, (True, False)), Capture(base.base, needs) as capture:
        found = states(base)
    assert all(torch.equal(capture.states.hidden[index], state) for index, state in enumerate(found))
    query = layers_of(donor.base)[1].get_submodule("attention.self.query")
    with torch.no_grad():
        assert torch.equal(capture.states.query[2].transpose(1, 2).flatten(2), query(found[1]))


def test_gradients_run_through_a_donors_layer_to_the_layers_below() -> None:
    base, donor = model(), model(seed=1)
    donor.requires_grad_(False)
    with grafted(base.base, donor.base, (True, False)):
        base(IDS, MASK, labels=torch.tensor([0, 1]))["loss"].backward()
    first, second = layers_of(base.base)
    assert all(p.grad is not None for p in first.parameters()) and all(p.grad is None for p in second.parameters())
    assert all(p.grad is None for p in donor.parameters())


def test_what_cannot_be_grafted_is_refused() -> None:
    base, donor = model(), model(seed=1)
    with pytest.raises(ValueError, match="own: 1 entries for 2 layers"), grafted(base.base, donor.base, [True]):
        pass
    with pytest.raises(ValueError, match="grafted on 1"), grafted(base.base, model(layers=1).base, (True, True)):
        pass
    donor.base.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"'sdpa'.*'eager'"), grafted(base.base, donor.base, (True, True)):
        pass


def wider() -> TaskModel:
    from transformers import AutoModel

    config = tiny.config()
    config.intermediate_size = 64
    return TaskModel(AutoModel.from_config(config), "classification", 2, head="linear", seed=0)


@pytest.mark.parametrize(
    ("student", "teacher", "named"),
    [
        (lambda: model("roberta"), lambda: model("bert"), "model_type, roberta, got bert"),
        (lambda: model(), wider, "intermediate_size, 32, got 64"),
        (lambda: model(), lambda: model(head="mlp"), "head, linear, got mlp"),
        (lambda: model(pooling="mean"), lambda: model(), "pooling, mean, got cls"),
        (lambda: model(layers=2), lambda: model(layers=1), "2 layers, got 1"),
    ],
)
def test_models_that_do_not_fit_are_refused_by_name(student: object, teacher: object, named: str) -> None:
    with pytest.raises(UserError, match=named):
        check_graft(student(), teacher())  # type: ignore[operator]


def test_models_that_fit_are_not_refused() -> None:
    for kind in tiny.KINDS:
        check_graft(model(kind), model(kind, seed=1))
    check_graft(model(layers=1), model())
