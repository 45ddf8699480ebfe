// Blocks of 64 x 64 or 128 x 128 times many rows of x on Hopper, for the device and for the host's tests alike.
//
// A block of threads multiplies 128 rows of the weight [N, K] by 128 rows of x ("tokens"), 64 columns at a step, a
// warpgroup to each 64 rows (wgmma.mma_async m64n128k16). Those of a cluster go through the same columns, the ones that
// any of its rows has a block in: each fetches a share of x for all that have its tokens, and of the weight's blocks for
// all that have its rows. So x is read once for up to 512 rows of the weight rather than for each block row; a warpgroup
// without a block at a step lets it pass.
//
// Tiles, places in a cluster and the way to y are those of two_four.h. A "cell" is 64 rows and 64 columns.

#pragma once

#include "two_four.h"

namespace sparsebert {

struct BlockCluster {
  static constexpr int64_t kCell = 64, kCellBytes = 2 * kCell * kCell;
  static constexpr int64_t kProducts = 4, kProductBytes = 32;  // of 16 columns each
  static constexpr int64_t kStageBytes = TwoFour::kTokenBytes + TwoFour::kGroups * kCellBytes, kStages = 3;
  // x comes in boxes, dealt out to the blocks that share it.
  static constexpr int64_t kBoxTokens = 32, kBoxes = TwoFour::kTokens / kBoxTokens;
  static constexpr int64_t kMostDown = 4, kMostSteps = 128;
};
static_assert(TwoFour::kTokens * TwoFour::kPitch <= BlockCluster::kStages * BlockCluster::kStageBytes);
static_assert(BlockCluster::kStageBytes % 1024 == 0);

struct BlockClusterJob {
  TwoFourJob layer;  // its weight and residue are not there
  const int32_t* columns;     // [blocks]
  const int32_t* row_starts;  // [N / size + 1]
  int64_t blocks;
  int64_t size;  // of a block: 64 or 128 rows and columns

  SB_HOST_DEVICE int64_t steps() const { return layer.shape.k / BlockCluster::kCell; }
  SB_HOST_DEVICE int64_t block_rows() const { return layer.shape.n / size; }
  SB_HOST_DEVICE int64_t cells() const { return size / BlockCluster::kCell; }  // along a side of a block
  // Where a cell begins in the matrix of all blocks one below another, `size` columns wide.
  SB_HOST_DEVICE int64_t row_of(int64_t block, int64_t group) const {
    return block * size + group % cells() * BlockCluster::kCell;
  }
  SB_HOST_DEVICE int64_t col_of(int64_t step) const { return step % cells() * BlockCluster::kCell; }

  // The cluster that fetches least: of x once for `down` tiles of rows, where any of them needs it, and of the weight
  // once for `across` tiles of tokens. At most an eighth is added to the tiles of tokens.
  void choose_cluster() {
    const int64_t tall = layer.shape.row_tiles(), tiles = layer.token_tiles();
    const double all = static_cast<double>(block_rows() * (layer.shape.k / size));
    const double density = static_cast<double>(blocks) / all;
    double least = 0;
    for (int64_t down = 1; down <= BlockCluster::kMostDown; ++down) {
      if (tall % down != 0) continue;
      int64_t across = down == 1 ? 8 : down == 2 ? 4 : 2;
      while (across > 1 && ((tiles + across - 1) / across * across - tiles) * 8 > tiles) across /= 2;
      double absent = 1;
      for (int64_t i = 0; i < TwoFour::kGroups * down / cells(); ++i) absent *= 1 - density;
      const double x = static_cast<double>(tall / down * steps() * TwoFour::kTokenBytes) * (1 - absent);
      const double weight = static_cast<double>(2 * blocks * size * size) / static_cast<double>(across);
      if (down == 1 || x + weight < least) {
        least = x + weight;
        layer.down = down;
        layer.across = across;
      }
    }
  }
};

// Which block each 64 rows of a cluster have at each step, -1 for none, and below them whether there is any: in shared
// memory, made by all threads of a block together, who meet between the three parts.
struct BlockTable {
  int32_t* entries;  // [2 * down + 1, steps]
  int64_t rows;
  int64_t steps;

  static constexpr int64_t kBytes = 4 * (2 * BlockCluster::kMostDown + 1) * BlockCluster::kMostSteps;

  SB_HOST_DEVICE BlockTable(const BlockClusterJob& job, int32_t* memory)
      : entries(memory), rows(TwoFour::kGroups * job.layer.down), steps(job.steps()) {}

  SB_HOST_DEVICE void clear(int64_t thread, int64_t threads) {
    for (int64_t i = thread; i < rows * steps; i += threads) entries[i] = -1;
  }
  SB_HOST_DEVICE void fill(const BlockClusterJob& job, const TwoFourTile& tile, int64_t thread, int64_t threads) {
    const int64_t first = (tile.row_tile - tile.row_rank) * TwoFour::kGroups, cells = job.cells();
    for (int64_t r = 0; r < rows && (first + r) / cells < job.block_rows(); ++r) {
      const int32_t* const start = global(job.row_starts) + (first + r) / cells;
      for (int64_t b = start[0] + thread; b < start[1]; b += threads) {
        const int64_t step = global(job.columns)[b] * cells;
        for (int64_t i = 0; i < cells; ++i) entries[r * steps + step + i] = static_cast<int32_t>(b);
      }
    }
  }
  SB_HOST_DEVICE void unite(int64_t thread, int64_t threads) {
    for (int64_t step = thread; step < steps; step += threads) {
      int32_t any = 0;
      for (int64_t r = 0; r < rows; ++r) any |= entries[r * steps + step] >= 0 ? 1 : 0;
      entries[rows * steps + step] = any;
    }
  }

  SB_HOST_DEVICE bool is_passed(int64_t step) const { return entries[rows * steps + step] == 0; }
  SB_HOST_DEVICE int64_t block(const TwoFourTile& tile, int64_t group, int64_t step) const {
    return entries[(tile.row_rank * TwoFour::kGroups + group) * steps + step];
  }
};

// Where a share of a warpgroup's cell lies in a stage.
SB_HOST_DEVICE inline uint32_t block_share_at(int64_t group, int64_t first_row) {
  return static_cast<uint32_t>(
      TwoFour::kTokenBytes + group * BlockCluster::kCellBytes + first_row * 2 * BlockCluster::kCell);
}

// Operands of 16 columns, 32 of the 128 bytes of a row: of a warpgroup's cell, and of all tokens.
SB_HOST_DEVICE inline uint64_t block_weight(uint32_t stage, int64_t group, int64_t product) {
  const uint32_t at = block_share_at(group, 0) + static_cast<uint32_t>(product * BlockCluster::kProductBytes);
  return operand(stage + at, 16, 8 * TwoFour::kTokenPitch, 1);
}
SB_HOST_DEVICE inline uint64_t block_tokens(uint32_t stage, int64_t product) {
  const auto at = static_cast<uint32_t>(product * BlockCluster::kProductBytes);
  return operand(stage + at, 16, 8 * TwoFour::kTokenPitch, 1);
}

}  // namespace sparsebert
