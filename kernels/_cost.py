"""What a launch moves and computes, and the least time that takes: the roofline, on paper and beside every timing."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CEILINGS", "Ceiling", "Cost"]


@dataclass(frozen=True)
class Ceiling:
    """What a device can do at most, as measured: a large copy, a large product."""

    bytes_per_second: float
    """Read plus written, of device memory."""
    flops_per_second: float
    """Of the tensor cores in bfloat16, dense."""


# Measured on an 8192^3 product of random bfloat16 and on large copies.
CEILINGS = {"H100": Ceiling(3.0e12, 800e12), "H200": Ceiling(4.3e12, 790e12)}


@dataclass(frozen=True)
class Cost:
    """What one call of an op does, counted from its own tiles and launches.

    `read` and `written` are bytes of device memory, each tensor once if the cache holds it while it is used again and
    as often as it is loaded otherwise; `flops` counts a multiply and an add as two.
    """

    read: int
    written: int
    flops: int
    launches: int = 1

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    def seconds(self, ceiling: Ceiling) -> float:
        """The least time it can take: memory or arithmetic, whichever binds."""
        return max(self.moved / ceiling.bytes_per_second, self.flops / ceiling.flops_per_second)

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.read + other.read,
            self.written + other.written,
            self.flops + other.flops,
            self.launches + other.launches,
        )
