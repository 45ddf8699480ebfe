"""The head of masked language modelling: read from a checkpoint, or new; its decoder is tied to the word embedding."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsebert.errors import UserError
from sparsebert.models.folder import INDEX, WEIGHTS
from sparsebert.nn import MaskedEmbedding
from sparsebert.ops.masked_linear import masked_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["MaskedLMHead", "new_mlm_head", "read_mlm_head", "word_embeddings"]

# Where each kind of model keeps dense layer, norm and output bias; the bias goes by the first name that is there.
_NAMES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "bert": (
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        ("cls.predictions.bias", "cls.predictions.decoder.bias"),
    ),
    "roberta": ("lm_head.dense", "lm_head.layer_norm", ("lm_head.bias", "lm_head.decoder.bias")),
    "distilbert": ("vocab_transform", "vocab_layer_norm", ("vocab_projector.bias",)),
}
# What the two tensors of a norm are called; the second of each in checkpoints of TensorFlow's days.
_NORM = {"weight": ("weight", "gamma"), "bias": ("bias", "beta")}


class MaskedLMHead(nn.Module):
    """Dense layer, activation and LayerNorm, then the word embedding as decoder with a bias of its own.

    The word embedding is the base's and is no part of the head.

    Args:
        config: of the base.
    """

    def __init__(self, config: Any) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        width = int(config.hidden_size)
        # DistilBERT calls its activation otherwise, and fixes the norm's epsilon.
        self.activation = ACT2FN[getattr(config, "hidden_act", None) or config.activation]
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=float(getattr(config, "layer_norm_eps", 1e-12)))
        self.bias = nn.Parameter(torch.zeros(int(config.vocab_size)))

    def forward(self, states: Tensor, words: nn.Module) -> Tensor:
        """The logits of every word.

        Args:
            states: `[N, width]`, the last layer's states at the places to predict.
            words: the base's word embedding, plain or masked; under a mask being learned its scores get the gradient
                of the decoder too.

        Returns:
            `[N, vocab]`, in the compute dtype.
        """
        hidden = self.norm(self.activation(self.dense(states)))
        if isinstance(words, MaskedEmbedding):
            bits = words.bits if words.weight.requires_grad else None
            return masked_linear(
                hidden, words.weight, words.masked_weight, words.score, bits, self.bias, grid=words.grid
            )
        return F.linear(hidden, words.weight, self.bias)  # type: ignore[arg-type]

    def loss(self, states: Tensor, labels: Tensor, words: nn.Module) -> Tensor:
        """Mean cross-entropy over the places to predict, a scalar; 0 where there are none.

        Args:
            states: `[batch, seq, width]`, the last layer's.
            labels: `[batch, seq]` int64, -100 where nothing is to be predicted.
            words: as for `forward`.
        """
        places = labels != -100
        # Gathered first: the logits of a whole batch would be seven times as many.
        logits = self(states[places], words).float()
        return F.cross_entropy(logits, labels[places], reduction="sum") / places.sum().clamp(min=1)


def word_embeddings(base: PreTrainedModel) -> nn.Module:
    """The base's word embedding, the module that is now in its place."""
    return base.get_submodule("embeddings.word_embeddings")


def new_mlm_head(base: PreTrainedModel, seed: int) -> MaskedLMHead:
    """An untrained head: dense weights N(0, 0.02) by `seed`, biases 0."""
    head = MaskedLMHead(base.config)
    nn.init.normal_(head.dense.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.dense.bias)
    return head


def read_mlm_head(source: str, base: PreTrainedModel) -> MaskedLMHead | None:
    """The masked-LM head of a checkpoint; None where it has none, or one whose decoder is not the word embedding.

    Args:
        source: the folder or hub id that `base` was loaded from.
        base: a BERT, RoBERTa or DistilBERT; only its configuration is looked at.

    Raises:
        UserError: a head that is incomplete, of other shapes than the configuration says, or not finite.
    """
    if not getattr(base.config, "tie_word_embeddings", True):
        return None
    dense, norm, biases = _NAMES[str(base.config.model_type)]
    wanted = {
        **{f"dense.{kind}": (f"{dense}.{kind}",) for kind in ("weight", "bias")},
        **{f"norm.{kind}": tuple(f"{norm}.{name}" for name in names) for kind, names in _NORM.items()},
        "bias": biases,
    }
    tensors = _read(source, {name for names in wanted.values() for name in names})
    if not tensors:
        return None
    head = MaskedLMHead(base.config)
    head.load_state_dict(
        {name: _tensor(source, tensors, names, head.get_parameter(name)) for name, names in wanted.items()}
    )
    return head


def _tensor(source: str, tensors: Mapping[str, Tensor], names: tuple[str, ...], expected: Tensor) -> Tensor:
    found = next((name for name in names if name in tensors), None)
    if found is None:
        raise UserError(f"{source}: its masked-LM head lacks {names[0]}; the checkpoint is incomplete")
    tensor = tensors[found].to(expected.dtype)
    if tensor.shape != expected.shape:
        raise UserError(f"{source}: {found} is {list(tensor.shape)}, expected {list(expected.shape)} by config.json")
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{source}: {found} holds NaN or infinite numbers; the checkpoint is damaged")
    return tensor


def _read(source: str, wanted: set[str]) -> dict[str, Tensor]:
    """Those of the `wanted` tensors that the checkpoint's safetensors files hold."""
    from safetensors import safe_open

    tensors: dict[str, Tensor] = {}
    for path in _files(source):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in wanted.intersection(file.keys())}
    return tensors


def _files(source: str) -> list[Path]:
    """The weights of a checkpoint that `load_base` has loaded and checked, whole or in shards."""
    whole = _find(source, WEIGHTS)
    if whole is not None:
        return [whole]
    index = _find(source, INDEX)
    if index is None:
        return []
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [path for path in (_find(source, name) for name in sorted(names)) if path is not None]


def _find(source: str, name: str) -> Path | None:
    if not source:
        return None
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from transformers.utils import cached_file

    # `load_base` has just brought it into the cache.
    found = cached_file(
        source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return None if found is None else Path(found)
