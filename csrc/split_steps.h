// P∘weight summed over each block and P∘mask in one pass over P, as a grid of blocks makes them. Every sum is taken in
// an order that the shapes alone fix: down the rows of a thread, over the threads of a column, along the columns of a
// cell, and where a cell is larger than a tile over its tiles, in double precision, in a launch of its own.

#pragma once

#include <cstdint>

#include "blocks.h"
#include "floats.h"
#include "grid.h"
#include "select_digits.h"

namespace sparsebert {

struct SplitJob {
  Grid grid;
  Float product_type;
  Float weight_type;
  const void* product;
  const void* weight;
  const uint8_t* bits;
  float* score_grad;  // null where the scores need none
  void* weight_grad;  // null where the weight needs none
  float* partial;     // [segments, grid.cols + column tiles]; null where every cell lies in one tile
  bool wide;          // 16-byte loads and stores
};

// A tile: 256 columns and 8 rows of threads, each of which owns 8 columns. A row of threads works on one segment of up
// to 32 rows of one grid row; low grid rows share a tile, so that all threads have work.
struct SplitTiles {
  static constexpr int64_t kThreads = 256;
  static constexpr int64_t kCols = 256;
  static constexpr int64_t kColUnits = kCols / kUnit;
  static constexpr int64_t kRowLanes = kThreads / kColUnits;
  static constexpr int64_t kSegment = 32;
  // In the sums over a cell's tiles.
  static constexpr int64_t kThreadsPerCell = 32;

  int64_t per_grid_row;  // segments
  int64_t segments;
  int64_t lanes;  // rows of threads to a segment: 1, 2, 4 or 8
  int64_t bands;  // segments to a tile
  int64_t col_tiles;
  int64_t tiles;
  bool whole;  // every cell lies in one tile

  SB_HOST_DEVICE explicit SplitTiles(const Grid& grid) {
    per_grid_row = (grid.height + kSegment - 1) / kSegment;
    segments = grid.rows * per_grid_row;
    lanes = grid.height >= 8 ? 8 : grid.height >= 4 ? 4 : grid.height >= 2 ? 2 : 1;
    bands = kRowLanes / lanes;
    const int64_t cols = grid.matrix_cols();
    col_tiles = (cols + kCols - 1) / kCols;
    tiles = (segments + bands - 1) / bands * col_tiles;
    whole = per_grid_row == 1 && (cols <= kCols || kCols % grid.width == 0);
  }
  SB_HOST_DEVICE int64_t partial_row(const Grid& grid) const { return grid.cols + col_tiles; }
  int64_t partials(const Grid& grid) const { return whole ? 0 : segments * partial_row(grid); }
};

struct SplitShared {
  float by_lane[SplitTiles::kThreads * kUnit];  // [row of threads][of 8 columns][unit of columns]
  float column[SplitTiles::kRowLanes * SplitTiles::kCols];
};

// One weight to a bit: nothing to sum.
template <typename Block>
SB_HOST_DEVICE void split_elements(Block& block, const SplitJob& job) {
  const int64_t total = job.grid.matrix_rows() * job.grid.matrix_cols(), units = units_for(total);
  block.threads([&](int64_t thread) {
    for (int64_t unit = block.id * block.size + thread; unit < units; unit += block.blocks * block.size) {
      const int64_t index = unit * kUnit, left = total - index, count = left < kUnit ? left : kUnit;
      const bool wide = job.wide && count == kUnit;
      const Eight p = load_eight(job.product_type, job.product, index, count, wide);
      if (job.score_grad != nullptr) {
        Eight w = load_eight(job.weight_type, job.weight, index, count, wide);
#pragma unroll
        for (int j = 0; j < kUnit; ++j) w.lane[j] *= p.lane[j];
        store_eight(Float::f32, job.score_grad, index, count, wide, w);
      }
      if (job.weight_grad != nullptr) {
        store_eight(job.weight_type, job.weight_grad, index, count, wide, keep_lanes(p, job.bits[unit]));
      }
    }
  });
}

// The rows of one thread: its 8 columns of P∘weight added up, and its part of P∘mask.
SB_HOST_DEVICE inline Eight split_rows(
    const SplitJob& job, int64_t row, int64_t end, int64_t step, int64_t col, int64_t count) {
  const int64_t cols = job.grid.matrix_cols();
  const bool wide = job.wide && count == kUnit;
  Eight sum;
#pragma unroll
  for (int j = 0; j < kUnit; ++j) sum.lane[j] = 0.0f;
  // All rows of a segment have the same cells.
  const uint32_t kept =
      job.weight_grad != nullptr ? kept_of_matrix(job.bits, job.grid, row * cols + col, count) : 0u;
  for (; row < end; row += step) {
    const int64_t index = row * cols + col;
    const Eight p = load_eight(job.product_type, job.product, index, count, wide);
    if (job.score_grad != nullptr) {
      const Eight w = load_eight(job.weight_type, job.weight, index, count, wide);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) sum.lane[j] += p.lane[j] * w.lane[j];
    }
    if (job.weight_grad != nullptr) {
      store_eight(job.weight_type, job.weight_grad, index, count, wide, keep_lanes(p, kept));
    }
  }
  return sum;
}

// Eight sums side by side, then together.
SB_HOST_DEVICE inline float sum_run(const float* x, int64_t n) {
  float lane[kUnit] = {};
  for (int64_t i = 0; i < n; i += kUnit) {
#pragma unroll
    for (int j = 0; j < kUnit; ++j) lane[j] += i + j < n ? x[i + j] : 0.0f;
  }
  return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

template <typename Block>
SB_HOST_DEVICE void split_tiles(Block& block, const SplitJob& job) {
  using T = SplitTiles;
  const T shape(job.grid);
  const Grid& grid = job.grid;
  const int64_t cols = grid.matrix_cols();
  SplitShared& s = block.shared;
  for (int64_t tile = block.id; tile < shape.tiles; tile += block.blocks) {
    const int64_t first_segment = tile / shape.col_tiles * shape.bands, col_tile = tile % shape.col_tiles;
    const int64_t first_col = col_tile * T::kCols;
    const int64_t width = cols - first_col < T::kCols ? cols - first_col : T::kCols;
    block.threads([&](int64_t thread) {
      const int64_t unit = thread % T::kColUnits, row_lane = thread / T::kColUnits;
      const int64_t segment = first_segment + row_lane / shape.lanes, grid_row = segment / shape.per_grid_row;
      const int64_t left = width - unit * kUnit;
      Eight sum = {};
      if (segment < shape.segments && left > 0) {
        const int64_t first = grid_row * grid.height + segment % shape.per_grid_row * T::kSegment;
        const int64_t bottom = (grid_row + 1) * grid.height;
        const int64_t end = first + T::kSegment < bottom ? first + T::kSegment : bottom;
        const int64_t row = first + row_lane % shape.lanes;
        if (row < end) {
          sum = split_rows(job, row, end, shape.lanes, first_col + unit * kUnit, left < kUnit ? left : kUnit);
        }
      }
#pragma unroll
      for (int j = 0; j < kUnit; ++j) s.by_lane[(row_lane * kUnit + j) * T::kColUnits + unit] = sum.lane[j];
    });
    if (job.score_grad == nullptr) continue;
    block.threads([&](int64_t thread) {
      for (int64_t i = thread; i < shape.bands * T::kCols; i += block.size) {
        const int64_t band = i / T::kCols, col = i % T::kCols;
        float sum = 0.0f;
        for (int64_t lane = band * shape.lanes; lane < (band + 1) * shape.lanes; ++lane) {
          sum += s.by_lane[(lane * kUnit + col % kUnit) * T::kColUnits + col / kUnit];
        }
        s.column[i] = sum;
      }
    });
    const int64_t first_cell = first_col / grid.width, cells = (first_col + width - 1) / grid.width - first_cell + 1;
    block.threads([&](int64_t thread) {
      for (int64_t i = thread; i < shape.bands * cells; i += block.size) {
        const int64_t segment = first_segment + i / cells, cell = first_cell + i % cells;
        if (segment >= shape.segments) continue;
        const int64_t begin = cell * grid.width - first_col, past = begin + grid.width;
        const int64_t low = begin > 0 ? begin : 0, high = past < width ? past : width;
        const float sum = sum_run(s.column + i / cells * T::kCols + low, high - low);
        if (shape.whole) job.score_grad[segment * grid.cols + cell] = sum;
        else job.partial[segment * shape.partial_row(grid) + cell + col_tile] = sum;
      }
    });
  }
}

struct SplitSumShared {
  double part[SplitTiles::kThreads];
};

// A cell's tiles together.
template <typename Block>
SB_HOST_DEVICE void split_sums(Block& block, const SplitJob& job) {
  constexpr int64_t kEach = SplitTiles::kThreadsPerCell;
  const SplitTiles shape(job.grid);
  const Grid& grid = job.grid;
  const int64_t at_once = block.size / kEach, cells = grid.rows * grid.cols;
  double* part = block.shared.part;
  for (int64_t first = block.id * at_once; first < cells; first += block.blocks * at_once) {
    block.threads([&](int64_t thread) {
      const int64_t cell = first + thread / kEach;
      double sum = 0;
      if (cell < cells) {
        const int64_t row = cell / grid.cols, col = cell % grid.cols;
        const int64_t first_tile = col * grid.width / SplitTiles::kCols;
        const int64_t across = ((col + 1) * grid.width - 1) / SplitTiles::kCols - first_tile + 1;
        for (int64_t i = thread % kEach; i < shape.per_grid_row * across; i += kEach) {
          const int64_t segment = row * shape.per_grid_row + i / across;
          sum += job.partial[segment * shape.partial_row(grid) + col + first_tile + i % across];
        }
      }
      part[thread] = sum;
    });
    block.threads([&](int64_t thread) {
      const int64_t cell = first + thread / kEach;
      if (thread % kEach != 0 || cell >= cells) return;
      double sum = 0;
      for (int64_t i = thread; i < thread + kEach; ++i) sum += part[i];
      job.score_grad[cell] = static_cast<float>(sum);
    });
  }
}

}  // namespace sparsebert
