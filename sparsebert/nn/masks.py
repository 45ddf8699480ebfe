"""All masks of a model together: one set of scores, one selection, one place where masks change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsebert._show import heat_map, rich_shares
from sparsebert.nn.masked import MaskedEmbedding, MaskedLinear
from sparsebert.ops.bits import expand_grid, pack_bits, unpack_bits
from sparsebert.ops.masked_weight import masked_weight
from sparsebert.ops.select_mask import select_mask, threshold_mask
from sparsebert.patterns import Allocation, Matrix, Pattern
from sparsebert.patterns.base import ALLOCATIONS, GridPattern, units_to_prune

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Masks"]


class Masks(nn.Module):
    """The masks of a model's prunable matrices, and the scores that shape them where masks are learned.

    Puts a `MaskedLinear` or `MaskedEmbedding` in the place of each matrix (weights shared, all kept at first). Bits,
    scores and what has ever been pruned (`recovery`) are part of its state, so a checkpoint of the training module
    holds them.

    Args:
        base: the model whose modules are replaced.
        matrices: what is masked.
        pattern: the sparsity pattern.
        dtype: compute dtype of the cached products.
    """

    def __init__(self, base: nn.Module, matrices: Sequence[Matrix], pattern: Pattern, dtype: torch.dtype) -> None:
        super().__init__()
        self.pattern = pattern
        self.matrices = list(matrices)
        self.groups = pattern.groups(matrices)
        self.scores: nn.ParameterList | None = None
        self._base = [base]
        self._modules_of: list[list[MaskedLinear | MaskedEmbedding]] = []
        device = next(base.parameters()).device
        for index, group in enumerate(self.groups):
            kept = torch.ones(math.prod(group.shape), dtype=torch.bool, device=device)
            self.register_buffer(f"bits_{index}", pack_bits(kept))
            self.register_buffer(f"ever_pruned_{index}", pack_bits(~kept))
            self._modules_of.append([self._replace(view.matrix.name, index, view.grid, dtype) for view in group.views])

    def _replace(
        self, name: str, index: int, grid: tuple[int, int], dtype: torch.dtype
    ) -> MaskedLinear | MaskedEmbedding:
        old, bits = self._base[0].get_submodule(name), getattr(self, f"bits_{index}")
        masked: MaskedLinear | MaskedEmbedding
        if isinstance(old, nn.Linear):
            masked = MaskedLinear(old, bits, grid, dtype)
        elif isinstance(old, nn.Embedding):
            masked = MaskedEmbedding(old, bits, grid, dtype)
        else:
            raise TypeError(f"{name}: expected nn.Linear or nn.Embedding, got {type(old).__name__}")
        self._put(name, masked.train(old.training))
        return masked

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self._base[0].get_submodule(parent), child, module)

    @property
    def bits(self) -> list[Tensor]:
        """Packed masks, one uint8 tensor per score group."""
        return [getattr(self, f"bits_{index}") for index in range(len(self.groups))]

    @property
    def _ever_pruned(self) -> list[Tensor]:
        """Packed as `bits`: 1 where any mask so far pruned the unit; padding means nothing."""
        return [getattr(self, f"ever_pruned_{index}") for index in range(len(self.groups))]

    def learn(self, init: Sequence[Tensor]) -> None:
        """Makes the scores trainable parameters with the given first values (one per group, of its shape)."""
        self.scores = nn.ParameterList([nn.Parameter(score.contiguous()) for score in init])
        for score, modules in zip(self.scores, self._modules_of, strict=True):
            for module in modules:
                module.hold_score(score)

    def freeze(self) -> None:
        """Masks stay as they are from here on: no gradient flows to the scores any more."""
        for modules in self._modules_of:
            for module in modules:
                module.hold_score(None)

    @torch.no_grad()
    def set_bits(self, bits: Sequence[Tensor], *, refresh: bool = True) -> None:
        """Takes new masks for all groups and makes the cached products anew."""
        for index, (packed, modules) in enumerate(zip(bits, self._modules_of, strict=True)):
            setattr(self, f"bits_{index}", packed)
            self._ever_pruned[index].bitwise_or_(packed.bitwise_not())
            for module in modules:
                module.set_bits(packed, refresh=refresh)

    def refresh(self) -> None:
        """Makes the cached products anew, after the weights changed or a checkpoint was loaded."""
        self.set_bits(self.bits)

    @torch.no_grad()
    def select(self, scores: Sequence[Tensor], sparsity: float, allocation: Allocation) -> None:
        """Sets the masks with exactly `sparsity` of the units pruned, those of smallest score.

        Raises:
            UserError: a sparsity that the pattern cannot have, or an unknown allocation.
        """
        if isinstance(self.pattern, GridPattern) and self._one_to_one and allocation in ALLOCATIONS:
            self.pattern.check_sparsity(sparsity)
            weights, out = self._weights_and_products()
            # One tensor after the other, or all at once.
            parts = [slice(None)] if allocation == "global" else [slice(i, i + 1) for i in range(len(scores))]
            bits: list[Tensor] = []
            for part in parts:
                pruned = units_to_prune(sparsity, sum(score.numel() for score in scores[part]))
                bits += select_mask(scores[part], pruned, weights[part], out[part])
            self.set_bits(bits, refresh=False)
        else:
            self.set_bits(self.pattern.select(self.groups, scores, sparsity, allocation))

    @torch.no_grad()
    def above(self, scores: Sequence[Tensor], threshold: float) -> None:
        """Sets the masks that keep every unit with a score above `threshold`."""
        if isinstance(self.pattern, GridPattern) and self._one_to_one:
            weights, out = self._weights_and_products()
            self.set_bits(threshold_mask(scores, threshold, weights, out), refresh=False)
        else:
            self.set_bits(self.pattern.above(self.groups, scores, threshold))

    @property
    def _one_to_one(self) -> bool:
        # Only then can one pass over the scores write bits and product together.
        return all(len(group.views) == 1 for group in self.groups)

    def _weights_and_products(self) -> tuple[list[Tensor], list[Tensor]]:
        modules = [modules[0] for modules in self._modules_of]
        return [module.weight for module in modules], [module.masked_weight for module in modules]

    def weights(self) -> dict[str, Tensor]:
        """The weight of each masked matrix, by its name."""
        pairs = (
            (view.matrix.name, module.weight)
            for group, modules in zip(self.groups, self._modules_of, strict=True)
            for view, module in zip(group.views, modules, strict=True)
        )
        return dict(pairs)

    @torch.no_grad()
    def magnitude(self) -> list[Tensor]:
        """Magnitude scores (`Pattern.magnitude`), below all others, -1, where a unit is pruned already.

        So pruning further never brings a unit back, whatever its weights have come to in the meantime.
        """
        scores = self.pattern.magnitude(self.groups, self.weights())
        return [score.masked_fill(~kept, -1.0) for score, kept in zip(scores, self.units(), strict=True)]

    @torch.no_grad()
    def zero_pruned(self) -> None:
        """Sets pruned weights to exactly zero in place (for methods that train weights)."""
        for modules in self._modules_of:
            for module in modules:
                module.weight.copy_(masked_weight(module.weight, module.bits, module.grid))

    def counts(self) -> tuple[int, int]:
        """Pruned and all units of the score groups."""
        total = sum(math.prod(group.shape) for group in self.groups)
        kept = sum(_count_bits(bits) for bits in self.bits)
        return total - kept, total

    def recovery(self) -> dict[str, Any]:
        """How many of the kept units some earlier mask had pruned (Gao et al., 2021: connection recovery).

        Returns:
            `kept` and `recovered`, counts of units; `share`, their ratio (0.0 where nothing is kept); `by_group`, the
            ratio in each score group by its name.
        """
        counts = [
            (_count_bits(ever & bits), _count_bits(bits))
            for ever, bits in zip(self._ever_pruned, self.bits, strict=True)
        ]
        recovered, kept = (sum(column) for column in zip(*counts, strict=True))
        shares = {group.name: part / max(1, whole) for group, (part, whole) in zip(self.groups, counts, strict=True)}
        return {"kept": kept, "recovered": recovered, "share": recovered / max(1, kept), "by_group": shares}

    def sparsity(self) -> float:
        """Share of the units that are pruned."""
        pruned, total = self.counts()
        return pruned / total

    def kept(self) -> dict[tuple[int | None, str], float]:
        """Share of the weights that are kept, by encoder layer (None: outside them) and component."""
        shares: dict[tuple[int | None, str], float] = {}
        for group, bits in zip(self.groups, self.bits, strict=True):
            share = _count_bits(bits) / max(math.prod(group.shape), 1)
            shares |= {(view.matrix.layer, view.matrix.component): share for view in group.views}
        order = [(matrix.layer, matrix.component) for matrix in self.matrices]
        return {key: shares[key] for key in order if key in shares}

    def _title(self) -> str:
        return f"masks: {self.sparsity():.2%} of the units pruned; weights kept by layer and component"

    def __rich__(self) -> Table:
        return rich_shares(self._title(), self.kept())

    def _repr_html_(self) -> str:
        return heat_map(self._title(), self.kept())

    def units(self) -> list[Tensor]:
        """The masks as bool tensors, one per score group, of the group's shape."""
        return [unpack_bits(bits, group.shape) for bits, group in zip(self.bits, self.groups, strict=True)]

    def dense(self) -> dict[str, Tensor]:
        """The mask of each matrix as a bool tensor of the weight's shape, by its name."""
        masks = {}
        for group, units in zip(self.groups, self.units(), strict=True):
            for view in group.views:
                masks[view.matrix.name] = expand_grid(units.reshape(view.grid), view.matrix.shape)
        return masks

    def remove(self) -> dict[str, Tensor]:
        """Puts plain modules back, pruned weights exactly zero, and returns the masks as `dense` does."""
        masks = self.dense()
        for group, modules in zip(self.groups, self._modules_of, strict=True):
            for view, module in zip(group.views, modules, strict=True):
                self._put(view.matrix.name, module.plain())
        return masks


def _count_bits(bits: Tensor) -> int:
    ones = torch.tensor([value.bit_count() for value in range(256)], device=bits.device)
    return int((torch.bincount(bits, minlength=256) * ones).sum())
