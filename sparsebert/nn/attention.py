"""Block-sparse attention in models: modules of its own, and `attn_implementation="sparsebert"` in transformers.

What a layer attends to is its *pattern*: `BlockLists` made for the longest sequence (shorter ones take their upper left
part), a function from a length to `BlockLists` (`functools.partial(sliding_window, window=256)`), a dict that names one
of `PATTERNS` (`{"pattern": "sliding_window", "window": 256}`), or None for every block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sparsebert.errors import UserError, unknown
from sparsebert.nn.attention_patterns import PATTERNS, dense
from sparsebert.ops import BlockLists, block_sparse_attention

__all__ = [
    "BlockSparseAttention",
    "BlockSparseSelfAttention",
    "Pattern",
    "PatternBlocks",
    "register_attention",
    "use_attention",
]

Pattern: TypeAlias = BlockLists | Callable[[int], BlockLists] | Mapping[str, Any] | None
NAME = "sparsebert"
CONFIG_KEY = "sparsebert_attention"
_ATTRIBUTE = "_sparsebert_blocks"
_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout")  # as BERT calls it, and DistilBERT
# Lists are small; a training with padding to the longest of a batch meets a few hundred lengths.
_REMEMBERED = 512


class PatternBlocks:
    """The lists of a pattern by length and device, made once each.

    Raises:
        ValueError: a pattern of another kind, or a name that is none of `PATTERNS`.
    """

    def __init__(self, pattern: Pattern = None) -> None:
        self.pattern = pattern
        self._make = _maker(pattern)
        self._made: OrderedDict[tuple[int, int, str], BlockLists] = OrderedDict()

    def get(self, queries: int, keys: int, device: torch.device | str = "cpu") -> BlockLists:
        """The lists for `queries` and `keys`, which may differ only where every block is attended."""
        key = (queries, keys, str(device))
        if key not in self._made:
            # Kept for later calls, some of which may train.
            with torch.inference_mode(False), torch.no_grad():
                self._made[key] = self._fresh(queries, keys).to(device)
                self._made[key].order()
            if len(self._made) > _REMEMBERED:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        return self._made[key]

    def _fresh(self, queries: int, keys: int) -> BlockLists:
        if self._make is None:
            return dense(queries, keys=keys)
        if queries != keys:
            raise ValueError(
                f"pattern: is of self-attention, but there are {queries} queries and {keys} keys (a cache of keys?)"
            )
        lists = self._make(queries)
        if not isinstance(lists, BlockLists):
            raise ValueError(f"pattern: expected it to give BlockLists, got {type(lists).__name__}")
        if lists.lengths != (queries, keys):
            raise ValueError(f"pattern: expected lists for {queries} tokens, got {lists.lengths}")
        return lists


class BlockSparseAttention(nn.Module):
    """`softmax(scale * Q K^T) V` over the blocks of a pattern; see `sparsebert.ops.block_sparse_attention`.

    Args:
        pattern: what is attended, see the module's head.
        heads: into how many the width is cut.
        scale: of the scores; None is `1 / sqrt(width / heads)`.
    """

    def __init__(self, pattern: Pattern, heads: int, *, scale: float | None = None) -> None:
        super().__init__()
        if heads < 1:
            raise ValueError(f"heads: expected at least 1, got {heads}")
        self.blocks = pattern if isinstance(pattern, PatternBlocks) else PatternBlocks(pattern)
        self.heads = heads
        self.scale = scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Attention of every head, side by side.

        Args:
            query, key, value: `[B, S, width]`, or `[tokens, width]` with `cu_seqlens`.
            key_mask: bool `[B, S]`, True where there is a token.
            cu_seqlens: int32 or int64 `[sequences + 1]`, where sequences without padding begin and end.

        Returns:
            Like query.

        Raises:
            ValueError: shapes that do not fit, named.
        """
        if query.dim() != (3 if cu_seqlens is None else 2) or query.shape[-1] % self.heads:
            wanted = "[B, S, width]" if cu_seqlens is None else "[tokens, width] with cu_seqlens"
            raise ValueError(
                f"query: expected {wanted} and a width that {self.heads} heads divide, got {list(query.shape)}"
            )
        if cu_seqlens is None:
            queries, keys = query.shape[1], key.shape[1]
        else:
            lengths = cu_seqlens.diff()
            queries = keys = int(lengths.max()) if lengths.numel() else 0
        blocks = self.blocks.get(queries, keys, query.device)
        q, k, v = (self._cut(x) for x in (query, key, value))
        out = block_sparse_attention(q, k, v, blocks, key_mask=key_mask, cu_seqlens=cu_seqlens, scale=self.scale)
        assert isinstance(out, Tensor)  # no log-sum-exp was asked for
        return out.flatten(1) if cu_seqlens is not None else out.transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"pattern={_named(self.blocks.pattern)}, heads={self.heads}"

    def _cut(self, x: Tensor) -> Tensor:
        cut = x.unflatten(-1, (self.heads, -1))
        return cut.transpose(1, 2) if x.dim() == 3 else cut


class BlockSparseSelfAttention(nn.Module):
    """A self-attention layer: projections to queries, keys and values, attention over a pattern, and one back.

    Args:
        width: of the tokens, in and out.
        heads: divides the width.
        pattern: what is attended, see the module's head.
        bias: of the four projections.
    """

    def __init__(self, width: int, heads: int, pattern: Pattern = None, *, bias: bool = True) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads: expected a divisor of the width {width}, got {heads}")
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)
        self.attention = BlockSparseAttention(pattern, heads)
        self.output = nn.Linear(width, width, bias=bias)

    @classmethod
    def from_multihead(cls, layer: nn.MultiheadAttention, pattern: Pattern = None) -> BlockSparseSelfAttention:
        """The layer that computes what a `torch.nn.MultiheadAttention` does, with copies of its weights.

        Raises:
            ValueError: what has no counterpart here, named: dropout, other widths of keys and values, added keys.
        """
        if layer.dropout:
            raise ValueError(f"layer.dropout: expected 0, since no attention map is there to drop, got {layer.dropout}")
        if not layer._qkv_same_embed_dim or layer.bias_k is not None or layer.add_zero_attn:
            raise ValueError("layer: expected self-attention (one width of q, k and v) without added keys")
        weight, shift = layer.in_proj_weight, layer.in_proj_bias
        made = cls(layer.embed_dim, layer.num_heads, pattern, bias=shift is not None).to(weight.device, weight.dtype)
        with torch.no_grad():
            for index, part in enumerate((made.query, made.key, made.value)):
                part.weight.copy_(weight.chunk(3)[index])
                if shift is not None:
                    part.bias.copy_(shift.chunk(3)[index])
        made.output.load_state_dict(layer.out_proj.state_dict())
        return made.train(layer.training)

    def forward(self, x: Tensor, key_mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Like x `[B, S, width]` (`[tokens, width]` with `cu_seqlens`); see `BlockSparseAttention.forward`."""
        mixed = self.attention(self.query(x), self.key(x), self.value(x), key_mask, cu_seqlens)
        out: Tensor = self.output(mixed)
        return out


def register_attention() -> None:
    """Make `attn_implementation="sparsebert"` known to transformers; once a process is enough, again does no harm.

    A model loaded or made with it attends as with `"sdpa"`, unless its config says otherwise under
    `sparsebert_attention` (a dict that names one of `PATTERNS`), or `use_attention` has given it patterns.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, _attention_mask)


def use_attention(
    model: nn.Module, pattern: Pattern | Sequence[Pattern] = None, *, attention_dropout: float | None = None
) -> nn.Module:
    """Let a transformers model attend over patterns; registers and sets `attn_implementation="sparsebert"`.

    Args:
        model: a BERT, RoBERTa, DistilBERT or another encoder whose attention functions can be chosen.
        pattern: one for all layers, or a sequence with one for each; see the module's head. A dict is written into the
            model's config, so that it is saved with the model.
        attention_dropout: 0.0 turns the dropout of attention maps off, in the layers and in the config: there is no
            map here to drop from, and training with it is refused. None leaves it.

    Returns:
        The model.

    Raises:
        UserError: a model without such layers, another number of patterns than of layers, or a dropout but 0.
    """
    layers = _attention_layers(model)
    if not layers:
        raise UserError(
            f"model: found no self-attention of transformers in {type(model).__name__} whose function can be chosen; "
            "expected a BERT, RoBERTa, DistilBERT or the like"
        )
    if attention_dropout not in (None, 0):
        raise UserError(f"attention_dropout: expected 0.0 or None, got {attention_dropout}")
    several = isinstance(pattern, Sequence)
    patterns: list[Pattern] = list(pattern) if isinstance(pattern, Sequence) else [pattern] * len(layers)
    if len(patterns) != len(layers):
        raise UserError(f"pattern: expected one, or one for each of {len(layers)} layers, got {len(patterns)}")
    # One provider for equal patterns, so that a length's lists are made once for all layers.
    shared: dict[int, PatternBlocks] = {}
    providers = [shared.setdefault(id(one), PatternBlocks(one)) for one in patterns]
    register_attention()
    model.set_attn_implementation(NAME)  # type: ignore[operator]  # of PreTrainedModel
    for layer, provider in zip(layers, providers, strict=True):
        layer.__dict__[_ATTRIBUTE] = provider
        if attention_dropout is not None:
            layer.dropout.p = 0.0  # type: ignore[union-attr]
    config: Any = model.config
    if attention_dropout is not None:
        name = (
            "attention_probs_dropout_prob" if hasattr(config, "attention_probs_dropout_prob") else "attention_dropout"
        )
        setattr(config, name, 0.0)
    if not several and isinstance(pattern, Mapping):
        setattr(config, CONFIG_KEY, dict(pattern))
    elif hasattr(config, CONFIG_KEY):
        delattr(config, CONFIG_KEY)
    return model


def _maker(pattern: Pattern) -> Callable[[int], BlockLists] | None:
    """The function from a length to lists; None for every block."""
    if pattern is None:
        return None
    if isinstance(pattern, BlockLists):
        return lambda length: _upper_left(pattern, length)
    if isinstance(pattern, Mapping):
        settings = dict(pattern)
        name = settings.pop("pattern", None)
        if name not in PATTERNS:
            raise unknown("attention pattern", name, PATTERNS)
        return lambda length: _called(name, length, settings)
    if callable(pattern):
        return pattern
    raise ValueError(
        "pattern: expected BlockLists, a function from a length to BlockLists, a dict with 'pattern' or None, got "
        f"{type(pattern).__name__}"
    )


def _called(name: str, length: int, settings: Mapping[str, Any]) -> BlockLists:
    try:
        return PATTERNS[name](length, **settings)
    except TypeError as error:
        raise UserError(f"attention pattern {name!r}: {error}") from error


def _upper_left(lists: BlockLists, length: int) -> BlockLists:
    """The lists' part for a shorter sequence."""
    queries, keys = lists.lengths
    if (queries, keys) == (length, length):
        return lists
    if length > min(queries, keys):
        raise ValueError(f"pattern: the lists are for {min(queries, keys)} tokens at most, got {length}")
    return BlockLists.from_mask(lists.to_mask()[..., :length, :length], lists.block)


def _named(pattern: Pattern) -> str:
    if isinstance(pattern, BlockLists):
        return f"BlockLists for {pattern.lengths[0]} x {pattern.lengths[1]}"
    return "dense" if pattern is None else repr(pattern)


def _attention_layers(model: nn.Module) -> list[nn.Module]:
    """The self-attention modules that call transformers' attention functions, in the model's order."""
    found = []
    for module in model.modules():
        name = type(module).__name__
        calls = hasattr(module, "scaling") and hasattr(module, "config")
        if name.endswith("Attention") and "Cross" not in name and calls:
            found.append(module)
    return found


def _blocks_of(module: nn.Module) -> PatternBlocks:
    """What a layer attends to: what `use_attention` gave it, or its config, or every block."""
    provider = module.__dict__.get(_ATTRIBUTE)
    if provider is None:
        config = getattr(module, "config", None)
        provider = PatternBlocks(getattr(config, CONFIG_KEY, None))
        module.__dict__[_ATTRIBUTE] = provider
    return provider


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: q, k, v `[B, H, S, D]` to `[B, S, H, D]`, and no map."""
    if dropout:
        raise UserError(
            f'attn_implementation="sparsebert": cannot train with attention dropout ({dropout}), since no map is there '
            "to drop from; set attention_probs_dropout_prob (DistilBERT: attention_dropout) to 0 in the "
            "config, or call sparsebert.use_attention(model, pattern, attention_dropout=0.0)"
        )
    if options.get("output_attentions"):
        raise UserError(
            'attn_implementation="sparsebert": output_attentions is not supported, since no attention map is made; '
            'model.set_attn_implementation("eager") has them'
        )
    for name in ("softcap", "position_bias", "head_mask"):
        if options.get(name) is not None:
            raise UserError(f'attn_implementation="sparsebert": {name} is not supported; use "eager" or "sdpa"')
    if key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    blocks = _blocks_of(module).get(query.shape[2], key.shape[2], query.device)
    key_mask, blocks = _masked(attention_mask, blocks, query.shape[0])
    out = block_sparse_attention(query, key, value, blocks, key_mask=key_mask, scale=scaling)
    assert isinstance(out, Tensor)  # no log-sum-exp was asked for
    return out.transpose(1, 2), None


def _masked(mask: Tensor | None, blocks: BlockLists, batch: int) -> tuple[Tensor | None, BlockLists]:
    """`(key_mask, blocks)`: a mask of keys alone as it is, any other one joined with the lists."""
    if mask is None:
        return None, blocks
    if mask.dim() != 4 or mask.dtype != torch.bool:
        raise UserError(
            'attention_mask: attn_implementation="sparsebert" takes [B, S] of 0 and 1, or bool [B, 1 or H, S, S] that '
            f"is True where attended, got {mask.dtype} {list(mask.shape)}"
        )
    if mask.shape[1] == 1 and mask.shape[2] == 1:
        return mask[:, 0, 0].expand(batch, -1), blocks
    mask = mask.expand(-1, -1, blocks.lengths[0], -1)
    return None, BlockLists.from_mask(blocks.to_mask() & mask, blocks.block)


def _attention_mask(*arguments: Any, **options: Any) -> Tensor | None:
    """transformers' mask function: of padding alone bool `[B, 1, 1, S]`, of anything else what sdpa would get."""
    from transformers import masking_utils

    padding = options.get("attention_mask")
    plain = options.get("mask_function") is masking_utils.bidirectional_mask_function
    offset = options.get("q_offset", 0), options.get("kv_offset", 0)
    if plain and not arguments and offset == (0, 0):
        if padding is None:
            return None
        if padding.dim() == 2 and padding.shape[1] == options.get("kv_length"):
            return padding.to(torch.bool)[:, None, None]
    made: Tensor | None = masking_utils.sdpa_mask(*arguments, **{**options, "allow_is_causal_skip": False})
    return made
