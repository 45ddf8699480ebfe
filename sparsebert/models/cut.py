"""A student made of a model's first layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsebert.errors import UserError
from sparsebert.models.capture import layers_of
from sparsebert.models.per_layer import write_widths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["keep_first_layers"]


def keep_first_layers(base: PreTrainedModel, count: int) -> None:
    """Drops all encoder layers but the first `count`, in place; the configuration says so afterwards.

    Raises:
        UserError: fewer than 1 layer, or more than the base has.
    """
    layers = layers_of(base)
    if not 1 <= count <= len(layers):
        raise UserError(f"student_layers {count}: expected 1 to {len(layers)}, the layers of the model")
    del layers[count:]
    # DistilBERT's own name for it is `n_layers`, which its configuration maps.
    base.config.num_hidden_layers = count
    if base.config.is_heterogeneous:
        write_widths(base)
