"""Which matrices of a BERT, RoBERTa or DistilBERT can be pruned, and how much of a model its masks prune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsebert.errors import UserError, unknown
from sparsebert.models.plain import plain_state
from sparsebert.patterns.matrix import Matrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "LAYOUTS",
    "MASKED",
    "Layout",
    "heads_of",
    "in_a_few_words",
    "layout_of",
    "prunable_matrices",
    "sparsity_report",
]

EMBEDDINGS = ("word_embeddings", "position_embeddings", "token_type_embeddings")

MASKED = ("encoder", "pooler", *EMBEDDINGS, "embeddings")
"""What can be asked for: `embeddings` stands for those of the three tables that the model has."""

ATTENTION = ("query", "key", "value", "attention_output")


@dataclass(frozen=True)
class Layout:
    """Where a kind of model keeps its matrices."""

    layers: str
    """Name of the module list of encoder layers."""
    linears: tuple[tuple[str, str], ...]
    """(component, module name inside a layer), in the order they run."""
    attention: str
    """The module, in a layer, that splits its width into heads."""
    heads: str
    """What that module calls the number of its heads."""


_BERT = Layout(
    "encoder.layer",
    (
        ("query", "attention.self.query"),
        ("key", "attention.self.key"),
        ("value", "attention.self.value"),
        ("attention_output", "attention.output.dense"),
        ("ffn_in", "intermediate.dense"),
        ("ffn_out", "output.dense"),
    ),
    "attention.self",
    "num_attention_heads",
)
_DISTILBERT = Layout(
    "transformer.layer",
    (
        ("query", "attention.q_lin"),
        ("key", "attention.k_lin"),
        ("value", "attention.v_lin"),
        ("attention_output", "attention.out_lin"),
        ("ffn_in", "ffn.lin1"),
        ("ffn_out", "ffn.lin2"),
    ),
    "attention",
    "n_heads",
)

LAYOUTS: dict[str, Layout] = {"bert": _BERT, "roberta": _BERT, "distilbert": _DISTILBERT}
"""The known kinds of model, by `config.model_type`."""


def layout_of(base: PreTrainedModel) -> Layout:
    """The layout of `base`; a `UserError` for a kind of model that is not known."""
    kind = str(base.config.model_type)
    if kind not in LAYOUTS:
        raise unknown("model type", kind, LAYOUTS)
    return LAYOUTS[kind]


def heads_of(base: PreTrainedModel) -> list[int]:
    """Attention heads of every encoder layer, by its module: where they differ, the configuration has none."""
    layout = layout_of(base)
    layers: Any = base.get_submodule(layout.layers)
    return [int(getattr(layer.get_submodule(layout.attention), layout.heads)) for layer in layers]


def in_a_few_words(base: PreTrainedModel) -> str:
    """Kind and sizes of a base model, to be shown: "bert, 12 layers, width 768, 12 heads"."""
    config, heads = base.config, sorted(set(heads_of(base)))
    counts = f"{heads[0]} to {heads[-1]}" if len(heads) > 1 else str(heads[0])
    return f"{config.model_type}, {config.num_hidden_layers} layers, width {config.hidden_size}, {counts} heads"


def prunable_matrices(base: PreTrainedModel, masked: Sequence[str] = ("encoder",)) -> list[Matrix]:
    """The matrices of `base` that `masked` names, in the order they run.

    Embeddings come first (word, position, token type), then per layer query, key, value, attention output, FFN in and
    FFN out, then the pooler. Biases, LayerNorm and task heads are never among them.

    Args:
        base: a BERT, RoBERTa or DistilBERT model; its modules may be replaced ones that keep a `weight`, its layers
            may be of different widths (`remove_structure`).
        masked: words of `MASKED`; order and repeats do not matter.

    Raises:
        UserError: an unknown word, nothing asked for, or a matrix asked for by name that the model does not have.
    """
    layout = layout_of(base)
    words = (masked,) if isinstance(masked, str) else tuple(masked)
    if not words:
        raise UserError(f"masked: expected at least one of {', '.join(MASKED)}, got none")
    for word in words:
        if word not in MASKED:
            raise unknown("masked part", word, MASKED)
    tables = [name for name in EMBEDDINGS if _wants_table(base, name, words)]
    matrices = [_matrix(base, f"embeddings.{name}", name) for name in tables]
    if "encoder" in words:
        for index, heads in enumerate(heads_of(base)):
            for component, name in layout.linears:
                full = f"{layout.layers}.{index}.{name}"
                matrices.append(_matrix(base, full, component, index, heads if component in ATTENTION else 0))
    if "pooler" in words:
        if getattr(base, "pooler", None) is None:
            raise UserError(f"masked: 'pooler' was asked for, but this {base.config.model_type} model has no pooler")
        matrices.append(_matrix(base, "pooler.dense", "pooler"))
    return matrices


def _wants_table(base: PreTrainedModel, name: str, words: Sequence[str]) -> bool:
    exists = getattr(base.get_submodule("embeddings"), name, None) is not None
    if name in words and not exists:
        raise UserError(f"masked: {name!r} was asked for, but a {base.config.model_type} model has none")
    return exists and (name in words or "embeddings" in words)


def _matrix(base: PreTrainedModel, name: str, component: str, layer: int | None = None, heads: int = 0) -> Matrix:
    weight = _weight(base.get_submodule(name))
    return Matrix(name, (int(weight.shape[0]), int(weight.shape[1])), component, layer, heads)


def _weight(module: nn.Module) -> Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(f"base: expected a module with a two-dimensional weight, got {type(module).__name__}")
    return weight


def sparsity_report(base: PreTrainedModel, masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """How much of `base` the masks prune, against every denominator that the papers use.

    Args:
        base: the model that the masks belong to.
        masks: module name to bool mask of its weight's shape, True where the weight is kept.

    Returns:
        `model`: pruned weights over all parameters of the base (biases, LayerNorm and embeddings included);
        `encoder`: pruned encoder weights over all weights of the six linears of every layer;
        `masked`: pruned over all entries of the matrices in `masks` (0.0 without any);
        `by_component`: the same per component of the matrices in `masks`;
        `by_layer`: pruned over all weights of the six linears, one number per encoder layer;
        `pruned` and `parameters`: counts; `mask_bytes`: size of the masks at one bit a weight, each rounded up.

    Raises:
        ValueError: a mask of another dtype or shape than its weight, or for no prunable matrix of the base.
    """
    known = {matrix.name: matrix for matrix in all_matrices(base)}
    pruned = {name: _pruned(known, name, mask) for name, mask in masks.items()}
    sizes = {name: matrix.shape[0] * matrix.shape[1] for name, matrix in known.items()}
    layers: dict[int, list[str]] = {}
    components: dict[str, list[str]] = {}
    for name, matrix in known.items():
        if matrix.layer is not None:
            layers.setdefault(matrix.layer, []).append(name)
        if name in masks:
            components.setdefault(matrix.component, []).append(name)

    def share(names: Sequence[str]) -> float:
        total = sum(sizes[name] for name in names)
        return sum(pruned.get(name, 0) for name in names) / total if total else 0.0

    parameters = sum(tensor.numel() for tensor in plain_state(base).values())
    return {
        "model": sum(pruned.values()) / parameters,
        "encoder": share([name for names in layers.values() for name in names]),
        "masked": share(list(masks)),
        "by_component": {component: share(names) for component, names in components.items()},
        "by_layer": [share(names) for _, names in sorted(layers.items())],
        "pruned": sum(pruned.values()),
        "parameters": parameters,
        "mask_bytes": sum((sizes[name] + 7) // 8 for name in masks),
    }


def all_matrices(base: PreTrainedModel) -> list[Matrix]:
    """Every prunable matrix that `base` has."""
    pooler = ("pooler",) if getattr(base, "pooler", None) is not None else ()
    return prunable_matrices(base, ("embeddings", "encoder", *pooler))


def check_mask(known: Mapping[str, Matrix], name: str, mask: Tensor) -> None:
    """A `ValueError` unless `mask` is a bool mask of the shape of the prunable matrix `name`."""
    if name not in known:
        raise ValueError(f"masks: {name!r} is no prunable matrix of the base")
    if mask.dtype != torch.bool or tuple(mask.shape) != known[name].shape:
        raise ValueError(f"masks[{name!r}]: expected bool {known[name].shape}, got {mask.dtype} {tuple(mask.shape)}")


def _pruned(known: Mapping[str, Matrix], name: str, mask: Tensor) -> int:
    check_mask(known, name, mask)
    return mask.numel() - int(mask.sum())
