"""TaskModel and its heads against their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparsebert.errors import UserError
from sparsebert.models.task_model import HEADS, KINDS, POOLINGS, LinearHead, ScalarMixHead, TaskModel

IDS = torch.tensor([[2, 5, 9, 7, 3], [2, 6, 3, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": MASK}
LOWEST = torch.finfo(torch.float32).min


def answers(task: str) -> dict[str, Tensor]:
    if task == "span":
        return {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([3, 2])}
    return {"labels": torch.tensor([0.5, 2.0]) if task == "regression" else torch.tensor([2, 0])}


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("task", KINDS)
def test_outputs_of_every_combination(tiny: Any, kind: str, task: str, head: str, pooling: str) -> None:
    model = TaskModel(tiny.base(kind), task, 3, head, pooling, head_width=6, seed=0)
    types = torch.zeros_like(IDS)
    output = model(**BATCH, token_type_ids=types, **answers(task))
    shapes = {key: tuple(value.shape) for key, value in output.items()}
    expected = {
        "classification": {"loss": (), "logits": (2, 3)},
        "regression": {"loss": (), "logits": (2,)},
        "span": {"loss": (), "start_logits": (2, 5), "end_logits": (2, 5)},
    }
    assert shapes == expected[task]
    assert {value.dtype for value in output.values()} == {torch.float32}
    assert "loss" not in model(**BATCH)
    output["loss"].backward()
    for name, parameter in model.head.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_scalar_mix_by_hand() -> None:
    torch.manual_seed(0)
    head = ScalarMixHead(layers=3, width=4, outputs=2, hidden=5).eval()
    assert torch.equal(head.mix.softmax(0), torch.full((3,), 1 / 3)) and head.gamma.item() == 1
    with torch.no_grad():
        head.mix.copy_(torch.tensor([0.0, 1.0, -2.0]))
        head.gamma.fill_(1.7)
        head.dense.bias.normal_()
        head.output.bias.normal_()
    states = [torch.randn(6, 4) for _ in range(3)]
    total = 1 + math.e + math.exp(-2)
    mixed = 1.7 * (1 / total * states[0] + math.e / total * states[1] + math.exp(-2) / total * states[2])
    hidden = (mixed @ head.dense.weight.T + head.dense.bias).clamp(min=0)
    torch.testing.assert_close(head(states), hidden @ head.output.weight.T + head.output.bias)


def test_scalar_mix_drops_out_in_training_only() -> None:
    head = ScalarMixHead(2, 4, 2, generator=torch.Generator().manual_seed(0))
    states = [torch.randn(50, 4), torch.randn(50, 4)]
    assert head.dense.out_features == 768 and head.dropout.p == 0.1
    assert not torch.equal(head(states), head(states))
    head.eval()
    assert torch.equal(head(states), head(states))


def test_scalar_mix_wants_every_layer() -> None:
    with pytest.raises(ValueError, match="expected 3 of them, got 2"):
        ScalarMixHead(3, 4, 2)([torch.zeros(1, 4)] * 2)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_mlp_head_sees_every_layer_pooled(tiny: Any, kind: str, pooling: str) -> None:
    base = tiny.base(kind)
    model = TaskModel(base, "classification", 3, "mlp", pooling, head_width=6, seed=0).eval()
    states = base(**BATCH, output_hidden_states=True).hidden_states
    assert len(states) == 3
    if pooling == "cls":
        pooled = [state[:, 0] for state in states]
    else:
        pooled = [torch.stack([state[0].mean(0), state[1, :3].mean(0)]) for state in states]
    torch.testing.assert_close(model(**BATCH)["logits"], model.head(pooled))


def test_mlp_head_is_applied_to_each_token_of_a_span(tiny: Any) -> None:
    base = tiny.base()
    model = TaskModel(base, "span", 2, "mlp", head_width=6, seed=0).eval()
    states = base(**BATCH, output_hidden_states=True).hidden_states
    expected = model.head([state[0, 3] for state in states])
    output = model(**BATCH)
    torch.testing.assert_close(torch.stack([output["start_logits"][0, 3], output["end_logits"][0, 3]]), expected)


def test_linear_head_takes_the_pooler_or_the_last_state(tiny: Any) -> None:
    base = tiny.base("bert")
    model = TaskModel(base, "classification", 3, "linear", seed=0).eval()
    output = base(**BATCH)
    assert isinstance(model.head, LinearHead)
    torch.testing.assert_close(model(**BATCH)["logits"], model.head.output(output.pooler_output))
    base.pooler = None
    torch.testing.assert_close(model(**BATCH)["logits"], model.head.output(output.last_hidden_state[:, 0]))
    mean = TaskModel(base, "classification", 3, "linear", "mean", seed=0).eval()
    rows = torch.stack([output.last_hidden_state[0].mean(0), output.last_hidden_state[1, :3].mean(0)])
    torch.testing.assert_close(mean(**BATCH)["logits"], mean.head.output(rows))


def test_hidden_states_are_asked_for_by_the_mlp_head_only(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for head in HEADS:
        base = tiny.base()
        model = TaskModel(base, "classification", 2, head)
        asked: list[bool] = []
        forward = base.forward

        def spy(*args: Any, forward: Any = forward, asked: list[bool] = asked, **kwargs: Any) -> Any:
            asked.append(bool(kwargs.get("output_hidden_states")))
            return forward(*args, **kwargs)

        monkeypatch.setattr(base, "forward", spy)
        model(**BATCH)
        assert asked == [head == "mlp"]


def test_token_types_matter_to_bert_alone(tiny: Any, kind: str) -> None:
    model = TaskModel(tiny.base(kind), "classification", 2, seed=0).eval()
    first = model(**BATCH, token_type_ids=torch.zeros_like(IDS))["logits"]
    second = model(**BATCH, token_type_ids=torch.ones_like(IDS))["logits"]
    assert torch.equal(first, second) == (kind != "bert")
    assert torch.equal(first, model(**BATCH)["logits"])


def test_losses_by_definition(tiny: Any) -> None:
    base = tiny.base()
    model = TaskModel(base, "classification", 3, seed=0).eval()
    output = model(**BATCH, **answers("classification"))
    torch.testing.assert_close(output["loss"], -output["logits"].log_softmax(-1)[[0, 1], [2, 0]].mean())
    model = TaskModel(base, "regression", 1, seed=0).eval()
    output = model(**BATCH, labels=torch.tensor([1, 3]))
    torch.testing.assert_close(output["loss"], (output["logits"] - torch.tensor([1.0, 3.0])).square().mean())
    model = TaskModel(base, "span", 2, seed=0).eval()
    output = model(**BATCH, **answers("span"))
    # The second row has three tokens; its padding takes no share.
    assert (output["start_logits"][1, 3:] == LOWEST).all() and (output["end_logits"][1, 3:] == LOWEST).all()
    start = F.cross_entropy(output["start_logits"][:1], torch.tensor([1])) + F.cross_entropy(
        output["start_logits"][1:, :3], torch.tensor([0])
    )
    end = F.cross_entropy(output["end_logits"][:1], torch.tensor([3])) + F.cross_entropy(
        output["end_logits"][1:, :3], torch.tensor([2])
    )
    torch.testing.assert_close(output["loss"], (start + end) / 4)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-7, 12), min_size=4, max_size=4))
def test_positions_outside_count_for_nothing(positions: list[int]) -> None:
    from sparsebert.models.task_model import _span_output

    tokens = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    outputs = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    start, end = torch.tensor(positions[:2]), torch.tensor(positions[2:])
    output = _span_output(outputs, tokens, start, end)
    expected = torch.zeros(())
    for channel, answer in ((0, positions[:2]), (1, positions[2:])):
        terms = [
            -outputs[row, :length, channel].log_softmax(0)[place]
            for row, (place, length) in enumerate(zip(answer, (4, 2), strict=True))
            if 0 <= place < length
        ]
        if terms:
            expected = expected + torch.stack(terms).mean() / 2
    torch.testing.assert_close(output["loss"], expected)
    output["loss"].backward()
    assert outputs.grad is not None and torch.isfinite(outputs.grad).all()


def test_answers_of_another_kind_of_task(tiny: Any) -> None:
    base = tiny.base()
    with pytest.raises(ValueError, match="start_positions and end_positions instead"):
        TaskModel(base, "span", 2)(**BATCH, labels=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="got one of them"):
        TaskModel(base, "span", 2)(**BATCH, start_positions=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="takes labels instead"):
        TaskModel(base, "classification", 2)(**BATCH, **answers("span"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "classify"}, UserError, "did you mean 'classification'"),
        ({"head": "mpl"}, UserError, "did you mean 'mlp'"),
        ({"pooling": "max"}, UserError, "known: cls, mean"),
        ({"num_labels": 1}, ValueError, "num_labels"),
        ({"head_width": 0}, ValueError, "head_width"),
        ({"label_names": ("a", "b")}, ValueError, "label_names: expected 3 names, got 2"),
    ],
)
def test_bad_arguments(tiny: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TaskModel(tiny.base(), **{"kind": "classification", "num_labels": 3, **arguments})


@pytest.mark.parametrize("head", HEADS)
def test_seed_fixes_the_head_and_leaves_the_global_generator(tiny: Any, head: str) -> None:
    base = tiny.base()
    before = torch.random.get_rng_state()
    first = TaskModel(base, "classification", 2, head, seed=3).head.state_dict()
    torch.manual_seed(99)
    second = TaskModel(base, "classification", 2, head, seed=3).head.state_dict()
    other = TaskModel(base, "classification", 2, head, seed=4).head.state_dict()
    torch.random.set_rng_state(before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["output.weight"], other["output.weight"])
    torch.manual_seed(5)
    third = TaskModel(base, "classification", 2, head).head.state_dict()
    torch.manual_seed(5)
    fourth = TaskModel(base, "classification", 2, head).head.state_dict()
    assert torch.equal(third["output.weight"], fourth["output.weight"])


def test_base_dropout_off_gives_the_same_features_in_every_step(tiny: Any) -> None:
    base = tiny.base()
    model = TaskModel(base, "classification", 2, "linear", seed=0)
    for linear_dropout in model.head.modules():
        if isinstance(linear_dropout, torch.nn.Dropout):
            linear_dropout.p = 0.0
    model.train()
    assert base.training and not torch.equal(model(**BATCH)["logits"], model(**BATCH)["logits"])
    model.set_base_dropout(False)
    assert not base.training and model.head.training
    assert torch.equal(model(**BATCH)["logits"], model(**BATCH)["logits"])
    assert model.eval() is model and model.train() is model
    assert not base.training and not any(module.training for module in base.modules())
    model.set_base_dropout(True)
    assert base.training


@pytest.mark.parametrize("head", HEADS)
def test_autocast_leaves_head_and_loss_in_fp32(tiny: Any, head: str) -> None:
    model = TaskModel(tiny.base(), "regression", 1, head, seed=0).eval()
    plain = model(**BATCH, **answers("regression"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(**BATCH, **answers("regression"))
    assert cast["logits"].dtype == cast["loss"].dtype == torch.float32
    torch.testing.assert_close(cast["logits"], plain["logits"], rtol=0.05, atol=0.05)
    assert not torch.equal(cast["logits"], cast["logits"].bfloat16().float())


@pytest.mark.parametrize("task", KINDS)
def test_compiles_whole_at_the_first_call(tiny: Any, task: str) -> None:
    torch._dynamo.reset()
    model = TaskModel(tiny.base(), task, 3, "mlp", head_width=6, seed=0).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    output = compiled(**BATCH, **answers(task))
    output["loss"].backward()
    gradient = model.head.dense.weight.grad
    model.zero_grad()
    expected = model(**BATCH, **answers(task))
    expected["loss"].backward()
    torch.testing.assert_close(output["loss"], expected["loss"])
    torch.testing.assert_close(gradient, model.head.dense.weight.grad)


def test_padding_changes_nothing(tiny: Any, kind: str) -> None:
    base = tiny.base(kind)
    for pooling in POOLINGS:
        model = TaskModel(base, "classification", 2, "mlp", pooling, seed=0).eval()
        alone = model(input_ids=IDS[1:, :3])["logits"]
        torch.testing.assert_close(model(**BATCH)["logits"][1:], alone, rtol=1e-4, atol=1e-5)


def test_frozen_base_gets_no_gradient(tiny: Any) -> None:
    base = tiny.base().requires_grad_(False)
    model = TaskModel(base, "classification", 3)
    model(**BATCH, **answers("classification"))["loss"].backward()
    assert all(parameter.grad is None for parameter in base.parameters())
