"""What the CUDA C++ ops move, from their own passes and tiles (csrc/select_steps.h, nm_steps.h, split_steps.h)."""

from __future__ import annotations

from sparsebert.kernels._cost import Cost

__all__ = ["SELECT_SHARED", "nm_mask", "score_passes", "select_mask", "split_weight_grad", "threshold_mask"]

# Bytes of a block's shared memory that hold histograms and sums; the rest of it holds keys.
SELECT_SHARED = 25152
# Rows that a tile of split_weight_grad adds up, and its columns.
SEGMENT, TILE_COLS = 32, 256
# An H100's, as an H200's.
PROCESSORS, SHARED, CACHE = 132, 227 * 1024, 50 * 2**20


def score_passes(
    scores: int, *, same_digit: float = 0.04, processors: int = PROCESSORS, shared: int = SHARED, cache: int = CACHE
) -> int:
    """How often `select_mask` reads each score from device memory: 1 to 4 times.

    Three rounds find the rank and a pass packs the bits. A round reads shared memory where that holds all keys left,
    and the second-level cache where that holds all scores.

    Args:
        scores: how many there are.
        same_digit: the share of them whose upper 12 bits are those of the one looked for; some 4% where they are
            spread as a weight's magnitudes are.
        processors, shared, cache: multiprocessors, bytes of shared memory to a block, of second-level cache.
    """
    if 4 * scores <= cache:
        return 1
    held = processors * ((shared - SELECT_SHARED) // 32 * 8)
    rounds = 1 if scores <= held else 2 if scores * same_digit <= held else 3
    return rounds + 1


def select_mask(
    scores: int,
    *,
    weights_per_score: int = 1,
    weight_bytes: int = 4,
    out_bytes: int = 2,
    tensors: int = 1,
    same_digit: float = 0.04,
) -> Cost:
    """One `select_mask` over `scores` scores in all; `weight_bytes=0` where no W·mask is written.

    The scratch of 56 KiB and, for several weights to a score, the bits read again stay in the second-level cache.
    """
    passes = score_passes(scores, same_digit=same_digit)
    return _masks(scores, passes, weights_per_score, weight_bytes, out_bytes, tensors)


def threshold_mask(
    scores: int, *, weights_per_score: int = 1, weight_bytes: int = 4, out_bytes: int = 2, tensors: int = 1
) -> Cost:
    """One `threshold_mask`; arguments as for `select_mask`."""
    return _masks(scores, 1, weights_per_score, weight_bytes, out_bytes, tensors)


def nm_mask(scores: int) -> Cost:
    """One `nm_mask`: a memset of the verdict on NaNs, and the pass."""
    return Cost(4 * scores, _bytes(scores), 0, launches=2)


def split_weight_grad(
    rows: int,
    cols: int,
    grid: tuple[int, int],
    *,
    product_bytes: int = 2,
    weight_bytes: int = 4,
    need_scores: bool = True,
    need_weight: bool = True,
) -> Cost:
    """One `split_weight_grad` of a `[rows, cols]` product on `grid`."""
    entries, cells = rows * cols, grid[0] * grid[1]
    height, width = rows // grid[0], cols // grid[1]
    read, written = entries * product_bytes, 0
    if need_weight:
        read += _bytes(cells)
        written += entries * weight_bytes
    launches = 1
    if need_scores:
        read += entries * weight_bytes
        written += 4 * cells
        segments, tiles = -(-height // SEGMENT), -(-cols // TILE_COLS)
        if (height, width) != (1, 1) and not (segments == 1 and (cols <= TILE_COLS or TILE_COLS % width == 0)):
            partial = 4 * grid[0] * segments * _parts(cols, width, tiles)
            read, written, launches = read + partial, written + partial, 2
    return Cost(read, written, 2 * entries if need_scores else 0, launches)


def _parts(cols: int, width: int, tiles: int) -> int:
    """Pieces that tiles and cells cut a row into."""
    edges = {*range(0, cols, width), *(tile * TILE_COLS for tile in range(tiles))}
    return len(edges)


def _masks(scores: int, passes: int, weights_per_score: int, weight_bytes: int, out_bytes: int, tensors: int) -> Cost:
    weights = scores * weights_per_score if weight_bytes else 0
    # A table of more than 32 tensors goes ahead, 32 to a launch.
    launches = 1 + (-(-tensors // 32) if tensors > 32 else 0)
    return Cost(4 * scores * passes + weights * weight_bytes, _bytes(scores) + weights * out_bytes, 0, launches)


def _bytes(bits: int) -> int:
    return (bits + 7) // 8
