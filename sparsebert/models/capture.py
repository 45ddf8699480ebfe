"""States of a base's layers, taken by hooks while it runs: hidden states, queries, keys and values, never a map."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsebert.models.prunable import heads_of, layout_of

if TYPE_CHECKING:
    from types import TracebackType

    from transformers import PreTrainedModel

__all__ = ["Capture", "Needs", "States", "layers_of"]


@dataclass(frozen=True)
class Needs:
    """Which states are wanted, by layer: 1 is the first encoder layer, 0 (hidden states only) the embedding output."""

    hidden: frozenset[int] = frozenset()
    """Outputs of layers."""
    attention: frozenset[int] = frozenset()
    """Queries and keys."""
    values: frozenset[int] = frozenset()

    def __or__(self, other: Needs) -> Needs:
        return Needs(self.hidden | other.hidden, self.attention | other.attention, self.values | other.values)


@dataclass
class States:
    """What one forward pass left, by layer as in `Needs`."""

    hidden: dict[int, Tensor] = field(default_factory=dict)
    """`[batch, seq, width]`."""
    query: dict[int, Tensor] = field(default_factory=dict)
    """`[batch, heads, seq, head width]`, a view of the projection's output, its bias included."""
    key: dict[int, Tensor] = field(default_factory=dict)
    value: dict[int, Tensor] = field(default_factory=dict)


class Capture:
    """Takes states while the `with` block lasts; `states` holds those of the newest forward pass.

    The graph runs through what is taken: a loss on it reaches the layers below. Nothing is computed that the model
    would not compute, so its attention may be a fused one.

    Args:
        base: a BERT, RoBERTa or DistilBERT, its linears perhaps replaced by masked ones.
        needs: which states.

    Raises:
        ValueError: a layer that the base does not have.
    """

    def __init__(self, base: PreTrainedModel, needs: Needs) -> None:
        self.base = base
        self.needs = needs
        self.states = States()
        self._handles: list[RemovableHandle] = []
        last = len(layers_of(base))
        for name, first in (("hidden", 0), ("attention", 1), ("values", 1)):
            wrong = [layer for layer in getattr(needs, name) if not first <= layer <= last]
            if wrong:
                raise ValueError(f"{name}: the base has layers {first} to {last}, got {sorted(wrong)}")

    def __enter__(self) -> Capture:
        self.states = States()
        layers, layout = layers_of(self.base), layout_of(self.base)
        names = dict(layout.linears)
        if 0 in self.needs.hidden:
            self._take(self.base.get_submodule("embeddings"), self.states.hidden, 0)
        for number, layer in enumerate(layers, 1):
            if number in self.needs.hidden:
                self._take(layer, self.states.hidden, number)
            if number in self.needs.attention:
                self._take(layer.get_submodule(names["query"]), self.states.query, number, heads=True)
                self._take(layer.get_submodule(names["key"]), self.states.key, number, heads=True)
            if number in self.needs.values:
                self._take(layer.get_submodule(names["value"]), self.states.value, number, heads=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _take(self, module: nn.Module, into: dict[int, Tensor], number: int, heads: bool = False) -> None:
        count = heads_of(self.base)[number - 1] if heads else 0

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            into[number] = state.unflatten(-1, (count, -1)).transpose(1, 2) if heads else state

        self._handles.append(module.register_forward_hook(hook))


def layers_of(base: PreTrainedModel) -> nn.ModuleList:
    """The module list of encoder layers."""
    layers = base.get_submodule(layout_of(base).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers
