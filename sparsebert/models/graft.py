"""Grafting: for one forward pass, some of a base's layers are another model's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from sparsebert.errors import UserError
from sparsebert.models.capture import layers_of
from sparsebert.models.per_layer import widths_of
from sparsebert.models.prunable import layout_of
from sparsebert.models.task_model import TaskModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_graft", "grafted", "inherit"]

_ALIKE = ("model_type", "hidden_size", "vocab_size", "max_position_embeddings")
"""What two models must have in common, by the configuration's names, for one's layers to run inside of the other."""


def check_graft(model: TaskModel, donor: TaskModel) -> None:
    """Raises a UserError unless `model` can take over all weights of `donor` that it has a place for, and its layers
    can stand in for as many layers of the donor each: the donor has a multiple of the layers."""
    mine, theirs = model.base.config, donor.base.config
    pairs = [(name, getattr(mine, name, None), getattr(theirs, name, None)) for name in _ALIKE]
    widths = ("num_attention_heads", "intermediate_size")
    pairs += list(zip(widths, _widths(model.base), _widths(donor.base), strict=True))
    pairs += [("head", model.head_kind, donor.head_kind), ("pooling", model.pooling, donor.pooling)]
    if model.head_kind == "mlp":
        pairs.append(("units of the head", model.head_width, donor.head_width))
    for name, here, there in pairs:
        if here != there:
            raise UserError(f"teacher: expected the student's {name}, {here}, got {there}; layers are taken from it")
    own, its = len(layers_of(model.base)), len(layers_of(donor.base))
    if its % own:
        raise UserError(f"teacher: expected a multiple of the student's {own} layers, got {its}")


def inherit(model: TaskModel, donor: TaskModel) -> None:
    """Copies the donor's weights into all places of `model`, head included; a model of fewer layers gets the first.

    The places may be masked ones; both must fit (`check_graft`).
    """
    state = donor.state_dict()
    model.load_state_dict({name: state[name] for name in model.state_dict()})


@contextmanager
def grafted(base: PreTrainedModel, donor: PreTrainedModel, own: Sequence[bool]) -> Iterator[None]:
    """While the `with` block lasts, `base` runs the donor's layers in place of some of its own.

    Everything else stays `base`'s. The donor's layers are no part of its state, parameters or modules before and
    after. `Capture` counts the layers that run, so it must be entered inside. transformers hooks a model's layers in
    the first call that wants its hidden states; that must have been before (`TaskModel` with an `mlp` head sees to it).

    Args:
        base: its list of layers is changed, and changed back.
        donor: has r times the layers of `base`; layer l of `base` stands for the donor's r * l ... r * l + r - 1.
        own: for each layer of `base`, whether it runs itself.

    Raises:
        ValueError: an `own` of another length, layers that do not divide, or two kinds of attention (each takes its
            mask in its own form).
    """
    path = layout_of(base).layers
    mine, theirs = layers_of(base), layers_of(donor)
    if len(own) != len(mine) or len(theirs) % len(mine):
        raise ValueError(f"own: {len(own)} entries for {len(mine)} layers grafted on {len(theirs)}")
    kinds = base.config._attn_implementation, donor.config._attn_implementation
    if kinds[0] != kinds[1]:
        raise ValueError(f"donor: expected attention {kinds[0]!r} as the base has, got {kinds[1]!r}")
    step = len(theirs) // len(mine)
    layers: list[nn.Module] = []
    for index, kept in enumerate(own):
        layers += [mine[index]] if kept else theirs[index * step : (index + 1) * step]
    parent, _, name = path.rpartition(".")
    holder = base.get_submodule(parent)
    setattr(holder, name, nn.ModuleList(layers))
    try:
        yield
    finally:
        setattr(holder, name, mine)


def _widths(base: PreTrainedModel) -> list[int | list[int]]:
    """Heads and neurons; of every layer where they differ, so that only the same layers are alike."""
    return [widths[0] if len(set(widths)) == 1 else list(widths) for widths in zip(*widths_of(base), strict=True)]
