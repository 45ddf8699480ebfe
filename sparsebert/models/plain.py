"""The parameters that a plain Hugging Face model has, told apart from what training puts beside them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["plain_state"]


def plain_state(base: PreTrainedModel) -> dict[str, Tensor]:
    """The entries of `base.state_dict()` that a plain model of the same class and configuration has, by sorted name.

    Training replaces some modules by ones that hold scores and masks beside `weight` and `bias`; those extra entries
    are left out. The tensors share memory with the model.

    Args:
        base: a BERT, RoBERTa or DistilBERT model.

    Raises:
        ValueError: `base` lacks a parameter of the plain model, for example after its structure was changed.
    """
    state = base.state_dict()
    # Only the names are wanted, so the twin is built without memory, without drawing random numbers, and with even
    # layers: their classes cannot read widths of their own.
    config = copy.deepcopy(base.config)
    config.per_layer_config = None
    with torch.device("meta"):
        twin = type(base)(config)
    names = set(twin.state_dict())
    if getattr(base, "pooler", None) is None:
        names = {name for name in names if not name.startswith("pooler.")}
    missing = sorted(names - state.keys())
    if missing:
        raise ValueError(
            f"base: expected the parameters of a plain {type(base).__name__}, but {', '.join(missing[:3])}"
            f"{' and others' if len(missing) > 3 else ''} are not there; convert replaced modules back first"
        )
    return {name: state[name] for name in sorted(names)}
