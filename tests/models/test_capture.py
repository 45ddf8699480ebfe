"""Capture takes what the model computes, leaves nothing behind, and names layers that are not there."""

from __future__ import annotations

import pytest
import tiny
import torch

from sparsebert.models.capture import Capture, Needs, layers_of
from sparsebert.models.cut import keep_first_layers
from sparsebert.ops.attention_kl import attention_kl

ALL = Needs(hidden=frozenset({0, 1, 2}), attention=frozenset({1, 2}), values=frozenset({2}))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_states_are_those_that_the_model_gives(kind: str) -> None:
    base = tiny.base(kind)
    ids = torch.randint(5, 20, (3, 6))
    expected = base(ids, output_hidden_states=True).hidden_states
    with Capture(base, ALL) as capture:
        base(ids)
    for layer, state in enumerate(expected):
        torch.testing.assert_close(capture.states.hidden[layer], state, rtol=0, atol=0)
    assert capture.states.query[1].shape == capture.states.key[2].shape == (3, 4, 6, 4)
    assert set(capture.states.value) == {2}


def test_maps_from_queries_and_keys_are_the_models_own() -> None:
    base = tiny.base("bert")
    base.set_attn_implementation("eager")
    ids = torch.randint(5, 20, (3, 6))
    with Capture(base, ALL) as capture:
        maps = base(ids, output_attentions=True).attentions
    for layer in (1, 2):
        q, k = capture.states.query[layer], capture.states.key[layer]
        torch.testing.assert_close((q @ k.mT / 4**0.5).softmax(-1), maps[layer - 1])


def test_a_loss_on_what_was_taken_reaches_the_layers_below() -> None:
    base, other = tiny.base("bert"), tiny.base("bert", seed=1)
    ids = torch.randint(5, 20, (3, 6))
    needs = Needs(attention=frozenset({2}))
    with Capture(base, needs) as mine, Capture(other, needs) as theirs, torch.no_grad():
        other(ids)
    with mine:
        base(ids)
    s, t = mine.states, theirs.states
    attention_kl(s.query[2], s.key[2], t.query[2], t.key[2]).backward()
    assert base.get_parameter("encoder.layer.0.output.dense.weight").grad is not None
    assert base.get_parameter("encoder.layer.1.output.dense.weight").grad is None


def test_no_hook_is_left_behind() -> None:
    base = tiny.base("bert")
    with Capture(base, ALL):
        pass
    assert all(not module._forward_hooks for name, module in base.named_modules() if name.endswith("query"))


@pytest.mark.parametrize("needs", [Needs(hidden=frozenset({3})), Needs(attention=frozenset({0}))])
def test_a_layer_that_is_not_there_is_named(needs: Needs) -> None:
    with pytest.raises(ValueError, match="the base has layers"):
        Capture(tiny.base("bert"), needs)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_first_layers_alone_are_the_same_model_cut_off(kind: str) -> None:
    base, ids = tiny.base(kind), torch.randint(5, 20, (3, 6))
    expected = base(ids, output_hidden_states=True).hidden_states[1]
    keep_first_layers(base, 1)
    assert base.config.num_hidden_layers == len(layers_of(base)) == 1
    torch.testing.assert_close(base(ids).last_hidden_state, expected)
    with pytest.raises(ValueError, match="student_layers 2: expected 1 to 1"):
        keep_first_layers(base, 2)
