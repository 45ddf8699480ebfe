"""The batches that are timed: sizes, lengths and random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsebert.errors import UserError, unknown

__all__ = ["LENGTHS", "SST2_LENGTHS", "SST2_SOURCE", "Case", "cases"]

LENGTHS = ("full", "real")
"""Kinds of lengths: every token real, or lengths as texts have them."""

SST2_LENGTHS = (4, 10, 12, 14, 16, 17, 19, 20, 21, 23, 25, 26, 27, 29, 30, 32, 34, 37, 40, 44, 55)
"""Quantiles of SST-2's lengths in steps of 5 %."""

SST2_SOURCE = (
    "SST-2's 872 validation sentences in BERT's uncased WordPiece, special tokens included "
    "(quantiles in steps of 5 %; mean 25)"
)


@dataclass(frozen=True)
class Case:
    """One batch."""

    kind: str
    """One of `LENGTHS`."""
    lengths: tuple[int, ...]
    """Real tokens of each sentence."""
    width: int
    """Tokens of each sentence with its padding."""

    @property
    def batch(self) -> int:
        """Sentences."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return sum(self.lengths)

    @property
    def name(self) -> str:
        """As tables show it: `8 x 128`, or `8 x 55, 201 real tokens`."""
        size = f"{self.batch} x {self.width}"
        return size if self.tokens == self.batch * self.width else f"{size}, {self.tokens} real tokens"

    def inputs(self, vocabulary: int, padding: int, seed: int, device: torch.device) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, int64 `[batch, width]`.

        Args:
            vocabulary: numbers of tokens; the ids are uniform over all but `padding`.
            padding: the padding token's number.
            seed: of the ids.
            device: where they go.
        """
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocabulary - 1, (self.batch, self.width), generator=generator)
        ids += ids >= padding
        mask = torch.arange(self.width) < torch.tensor(self.lengths)[:, None]
        return {"input_ids": ids.where(mask, padding).to(device), "attention_mask": mask.long().to(device)}


def cases(batch_sizes: Sequence[int], seq_lens: Sequence[int], kinds: Sequence[str], real: Sequence[int]) -> list[Case]:
    """The batches that are asked for, each once.

    With real lengths a batch of B sentences has the distribution's quantiles at (i + 0.5) / B, so that no chance
    decides what is measured, cut at the sequence length, and is padded to its longest sentence.

    Args:
        batch_sizes: sentences of a batch.
        seq_lens: tokens of a sentence, at most.
        kinds: words of `LENGTHS`.
        real: lengths of texts, any number of them.

    Raises:
        UserError: a size below 1 or an unknown kind.
    """
    for name, sizes in (("batch-sizes", batch_sizes), ("seq-lens", seq_lens)):
        if not sizes or min(sizes) < 1:
            got = " ".join(map(str, sizes)) or "none"
            raise UserError(f"{name}: expected at least one, each at least 1, got {got}")
    found: list[Case] = []
    for kind in kinds:
        if kind not in LENGTHS:
            raise unknown("lengths", kind, LENGTHS)
        for longest in seq_lens:
            for batch in batch_sizes:
                lengths = _quantiles(real, batch, longest) if kind == "real" else (longest,) * batch
                found.append(Case(kind, lengths, max(lengths)))
    # Another cut may change nothing, where all texts are shorter.
    return list({(case.lengths, case.width): case for case in reversed(found)}.values())[::-1]


def _quantiles(real: Sequence[int], batch: int, longest: int) -> tuple[int, ...]:
    places = (np.arange(batch) + 0.5) / batch
    wanted = np.quantile(np.asarray(real, dtype=np.float64), places)
    return tuple(int(length) for length in np.clip(np.rint(wanted), 1, longest))
