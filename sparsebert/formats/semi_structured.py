"""n of every m consecutive weights stored, as `sparsebert.ops.semi_structured_linear` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsebert.formats.base import Format, check_content, check_tensor, is_pair, kept_of, masked
from sparsebert.formats.unstructured import transposed_tiles
from sparsebert.ops.semi_structured_linear import MAX_M, position_bits, semi_structured_linear, stored_columns

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SemiStructured"]


@dataclass(eq=False, repr=False)
class SemiStructured(Format):
    """At most n of every m consecutive weights of a row, m | K: 2, 4 or 8 bits beside each."""

    positions: Tensor
    """uint8 `[N, ceil(K / m * n * bits / 8)]`: each value's position within its group, packed."""
    pattern: tuple[int, int]
    """`(n, m)`."""

    name = "semi_structured"
    op = "semi_structured_linear"
    option_names = ("pattern",)

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor | None = None, pattern: Sequence[int] = (2, 4)) -> Self:
        """As `Format.from_dense`, with `pattern` `(n, m)`; a ValueError where a group has more than n kept weights.

        A group with fewer is filled up with zeros at its lowest other positions; `exact` is False where there is one.
        """
        kept = kept_of(weight, mask)
        (rows, k), (n, m) = weight.shape, _checked(pattern, weight.shape[1])
        groups = kept.reshape(rows, k // m, m)
        lengths = groups.sum(2)
        most = int(lengths.max()) if lengths.numel() else 0
        if most > n:
            row, group = (int(i) for i in (lengths > n).nonzero()[0])
            raise ValueError(
                f"mask: {n}:{m} keeps at most {n} of {m}, but row {row}, columns {group * m} to {group * m + m - 1} "
                f"keep {int(lengths[row, group])}"
            )
        # The fillers: of the positions that are not kept the lowest, as many as are missing.
        filler = ~groups & ((~groups).cumsum(2, dtype=torch.int16) <= (n - lengths)[:, :, None])
        column = (groups | filler).view(rows, k).nonzero()[:, 1].view(rows, k // m * n)
        values = masked(weight.detach(), kept).gather(1, column)
        exact = values.numel() == int(lengths.sum())
        return cls(values, (rows, k), _pack((column % m).to(torch.uint8), m), (n, m), exact=exact)

    def to_dense(self) -> Tensor:
        return self.values.new_zeros(self.shape).scatter(1, self._columns(), self.values)

    def stored(self) -> Tensor:
        kept = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        return kept.scatter_(1, self._columns(), True)

    def check(self) -> None:
        (rows, k), (n, m) = self.shape, _checked(self.pattern, self.shape[1])
        stored, bits = k // m * n, position_bits(m)
        check_tensor("values", self.values, None, [rows, stored], self.device)
        check_tensor("positions", self.positions, torch.uint8, [rows, (stored * bits + 7) // 8], self.device)
        place = self._columns().view(rows, k // m, n) - torch.arange(k // m, device=self.device)[:, None] * m
        check_content("positions", place < m, place, f"0 to {m - 1}")
        check_content("positions", place[..., 1:] > place[..., :-1], place[..., 1:], "ascending within a group")
        again = _pack(place.view(rows, stored).to(torch.uint8), m)
        check_content("positions", again == self.positions, self.positions, "zero bits after the last position")

    def linear(
        self, x: Tensor, bias: Tensor | None = None, activation: str = "none", transposed: Sequence[Tensor] = ()
    ) -> Tensor:
        return semi_structured_linear(
            x, self.values, self.positions, bias, pattern=self.pattern, activation=activation, transposed=transposed
        )

    def transposed(self) -> list[Tensor]:
        column = self._columns()
        row = torch.arange(self.shape[0], device=self.device)[:, None].expand_as(column)
        return transposed_tiles(row.flatten(), column.flatten(), self.shape)

    @property
    def spelling(self) -> str:
        return f"{self.name}:{self.pattern[0]}:{self.pattern[1]}"

    def _columns(self) -> Tensor:
        return stored_columns(self.positions, self.values.shape[1], *self.pattern)


def _checked(pattern: Sequence[int], k: int) -> tuple[int, int]:
    if not is_pair(pattern) or not 1 <= pattern[0] <= pattern[1] <= MAX_M:
        raise ValueError(f"pattern: expected (n, m) with 1 <= n <= m <= {MAX_M}, got {pattern!r}")
    n, m = int(pattern[0]), int(pattern[1])
    if k % m:
        raise ValueError(f"pattern: {n}:{m} does not divide the weight's {k} columns")
    return n, m


def _pack(place: Tensor, m: int) -> Tensor:
    """Positions uint8 `[N, stored]` to bytes, least significant bits first."""
    bits = position_bits(m)
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(place, (0, -place.shape[1] % per_byte)).unflatten(1, (-1, per_byte))
    # A sum of shifts rather than |: at most 255, so uint8 holds it exactly.
    return (padded << torch.arange(0, 8, bits, dtype=torch.uint8, device=place.device)).sum(2, dtype=torch.uint8)
