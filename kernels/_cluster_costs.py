"""What `block_cluster_linear` moves and computes, from its own tiles and clusters (csrc/block_cluster.h)."""

from __future__ import annotations

from sparsebert.kernels._cost import Cost

__all__ = ["block_cluster_linear", "plan", "traffic"]

TILE, CELL, MOST_DOWN = 128, 64, 4


def plan(m: int, n: int, k: int, size: int, blocks: int) -> tuple[int, int]:
    """Blocks of a cluster: so many below one another in the weight, times so many with other tokens."""
    return min(_plans(m, n, k, size, blocks), key=lambda found: found[0])[1:]


def traffic(m: int, n: int, k: int, size: int, blocks: int) -> int:
    """Bytes that the launch's blocks fetch, mostly from the second-level cache; of a random mask of so many blocks."""
    least, _, across = min(_plans(m, n, k, size, blocks), key=lambda found: found[0])
    tiles = (m + TILE - 1) // TILE
    return round(least * (tiles + -tiles % across))


def _plans(m: int, n: int, k: int, size: int, blocks: int) -> list[tuple[float, int, int]]:
    """For each number of tiles below one another the bytes to a tile of tokens, and the cluster."""
    tall, tiles, density = -(-n // TILE), -(-m // TILE), blocks / ((n // size) * (k // size))
    found = []
    for down in (down for down in range(1, MOST_DOWN + 1) if tall % down == 0):
        across = {1: 8, 2: 4}.get(down, 2)
        while across > 1 and (-tiles % across) * 8 > tiles:
            across //= 2
        absent = (1 - density) ** (2 * down * CELL // size)
        x = tall // down * k * 2 * TILE * (1 - absent)
        found.append((x + 2 * blocks * size**2 / across, down, across))
    return found


def block_cluster_linear(m: int, n: int, k: int, size: int, blocks: int, bias: bool = True) -> Cost:
    """A call with 16-bit numbers: x, the blocks and their index read once, y written; FLOPs of whole token tiles."""
    index = 4 * (blocks + n // size + 1)
    read = 2 * (m * k + blocks * size**2 + (n if bias else 0)) + index
    return Cost(read, 2 * m * n, 2 * -(-m // TILE) * TILE * blocks * size**2)
