"""The order in which examples are seen: shuffled, batches of like length, a function of seed and epoch alone."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset

from sparsebert.data import Encoded

__all__ = ["LengthGrouped"]

_BATCHES_SORTED_TOGETHER = 50


class LengthGrouped(Dataset[dict[str, Any]]):
    """Examples in a new order every epoch, such that consecutive ones fill batches of like length.

    The order is drawn from seed and epoch and from nothing else, so a resumed run sees what the first would have seen
    (Trainer's own length grouping draws from the global random state, which a resumed epoch has no more).
    Read in sequence: Trainer's `train_sampling_strategy="sequential"`.

    Args:
        encoded: the examples.
        batch_size: examples of one optimiser micro-batch over all ranks.
        seed: of the order.
    """

    def __init__(self, encoded: Encoded, batch_size: int, seed: int) -> None:
        self.encoded = encoded
        self.batch_size = batch_size
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draws the order of an epoch; Trainer calls it."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        shuffled = torch.randperm(len(self.encoded), generator=generator).tolist()
        lengths = self.encoded.lengths
        size, span = self.batch_size, self.batch_size * _BATCHES_SORTED_TOGETHER
        batches: list[list[int]] = []
        for start in range(0, len(shuffled), span):
            near = sorted(shuffled[start : start + span], key=lambda index: lengths[index])
            batches += [near[first : first + size] for first in range(0, len(near), size)]
        # A short batch can only stand at the end of the epoch, where Trainer's loader expects it.
        whole = [batch for batch in batches if len(batch) == size]
        rest = [index for batch in batches if len(batch) < size for index in batch]
        turns = torch.randperm(len(whole), generator=generator).tolist()
        self.order = [index for turn in turns for index in whole[turn]] + rest

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.encoded[self.order[position]]
