// Weights as bitmaps in the order of a tensor core's operand, for the device and for the host's tests alike.
//
// A tile is 16 rows and 64 columns of a weight [N, K]; tiles lie row after row of tiles, and what they hold beyond the
// weight's edges is not there. A tile belongs to the 32 lanes of a warp, 32 weights to a lane: one word of bits and its
// values one after another, lane after lane. The bits are in the order of the four registers of an A operand of
// mma.m16n8k16, for four such products. Which column of the tile is which k of a product is free: lane t of a quad has
// the 16 columns from 16 t on, so that what it needs of a row of x, the B operand, is 32 bytes in a row.

#pragma once

#include <cstdint>

#include "activate.h"
#include "floats.h"
#include "grid.h"

namespace sparsebert {

constexpr int64_t kBitmapRows = 16, kBitmapCols = 64, kBitmapLanes = 32, kBitmapMost = kBitmapRows * kBitmapCols;
constexpr int64_t kBitmapWarps = 8, kBitmapStages = 3;
// A row of sums in shared memory has one more than the tile has rows, for its banks.
constexpr int64_t kBitmapPitch = kBitmapRows + 1;
constexpr int64_t kBitmapChunk = 8;  // values to a copy of 16 bytes

// Where a lane's bit lies in its tile.
SB_HOST_DEVICE inline int64_t bitmap_row(int64_t lane, int64_t bit) { return lane / 4 + 8 * (bit / 2 % 2); }
SB_HOST_DEVICE inline int64_t bitmap_col(int64_t lane, int64_t bit) {
  return 16 * (lane % 4) + 4 * (bit / 8) + 2 * (bit / 4 % 2) + bit % 2;
}

SB_HOST_DEVICE inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

struct BitmapWeight {
  const uint16_t* values;  // aligned to 16 bytes
  const uint32_t* bits;
  const int64_t* starts;
  int64_t n;
  int64_t k;
  int64_t nnz;

  SB_HOST_DEVICE int64_t row_tiles() const { return (n + kBitmapRows - 1) / kBitmapRows; }
  SB_HOST_DEVICE int64_t col_tiles() const { return (k + kBitmapCols - 1) / kBitmapCols; }
  SB_HOST_DEVICE int64_t tiles() const { return row_tiles() * col_tiles(); }
  // A tile's first value, whatever the tensor says within the values there are.
  SB_HOST_DEVICE int64_t start(int64_t tile) const {
    const int64_t first = global(starts)[at_most(tile, tiles())];
    return first < 0 ? 0 : at_most(first, nnz);
  }
};

// What a warp has of a tile in shared memory. Values begin where their 16 bytes begin, up to 7 too early.
struct alignas(16) BitmapStage {
  uint32_t bits[kBitmapLanes];
  uint16_t values[kBitmapMost + kBitmapChunk];
};

// A product's operand A (four times four registers) out of a lane's values.
SB_HOST_DEVICE inline void bitmap_fragment(uint32_t bits, const uint16_t* values, uint32_t (&words)[16]) {
#pragma unroll
  for (int w = 0; w < 16; ++w) {
    uint32_t low = 0, high = 0;
    if ((bits >> (2 * w)) & 1u) low = *values++;
    if ((bits >> (2 * w + 1)) & 1u) high = *values++;
    words[w] = low | (high << 16);
  }
}

// The 8 words of 16 columns of a row from `col` on; what is beyond `cols` is 0. `wide`: whole 16 bytes can be read.
SB_HOST_DEVICE inline void load_sixteen(
    const uint16_t* row, int64_t col, int64_t cols, bool wide, uint32_t (&words)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t from = col + 8 * half;
    Words four{};
    if (wide) {
      if (from < cols) four = *reinterpret_cast<const Words*>(global(row) + from);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t value = from + j < cols ? global(row)[from + j] : 0u;
        four.word[j / 2] |= value << (16 * (j % 2));
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) words[4 * half + j] = four.word[j];
  }
}

// The mirror of load_sixteen.
SB_HOST_DEVICE inline void store_sixteen(
    uint16_t* row, int64_t col, int64_t cols, bool wide, const uint32_t (&words)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t from = col + 8 * half;
    if (wide) {
      Words four;
#pragma unroll
      for (int j = 0; j < 4; ++j) four.word[j] = words[4 * half + j];
      if (from < cols) *reinterpret_cast<Words*>(global(row) + from) = four;
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (from + j < cols) global(row)[from + j] = static_cast<uint16_t>(words[4 * half + j / 2] >> (16 * (j % 2)));
      }
    }
  }
}

// How a product with few rows of x is spread over blocks of 8 warps: a block has one or a few rows of tiles, each
// shared out among its warps along K, and 8 to 64 rows of x ("tokens" here). Where that makes too few blocks, K is
// split among several, whose sums a second kernel adds up in a fixed order.
struct BitmapPlan {
  int64_t row_tiles;   // of the weight
  int64_t col_tiles;
  int64_t per_block;   // rows of tiles to a block
  int64_t parts;       // warps to a row of tiles
  int64_t groups;      // of eight tokens to a block: 1, 2, 4 or 8
  int64_t token_tiles;
  int64_t splits;

  SB_HOST_DEVICE int64_t tokens() const { return 8 * groups; }
  int64_t row_blocks() const { return (row_tiles + per_block - 1) / per_block; }
};

inline BitmapPlan bitmap_plan(int64_t n, int64_t k, int64_t rows, int64_t processors) {
  constexpr int64_t kLeastTilesToSplit = 16;
  BitmapPlan plan{};
  plan.row_tiles = (n + kBitmapRows - 1) / kBitmapRows;
  plan.col_tiles = (k + kBitmapCols - 1) / kBitmapCols;
  plan.groups = rows <= 8 ? 1 : rows <= 16 ? 2 : rows <= 32 ? 4 : 8;
  plan.token_tiles = (rows + plan.tokens() - 1) / plan.tokens();
  plan.per_block = plan.row_tiles >= 4 * processors ? 4 : plan.row_tiles >= 2 * processors ? 2 : 1;
  plan.parts = kBitmapWarps / plan.per_block;
  const int64_t blocks = plan.row_blocks() * plan.token_tiles;
  plan.splits = blocks < processors ? processors / blocks : 1;
  plan.splits = at_most(plan.splits, plan.col_tiles / kLeastTilesToSplit);
  if (plan.splits < 1) plan.splits = 1;
  return plan;
}

// The tiles [first, last) of row of tiles `row_tile` that a warp multiplies.
struct BitmapPart {
  int64_t row_tile;
  int64_t first;
  int64_t last;
  int64_t token;
};

SB_HOST_DEVICE inline BitmapPart bitmap_part(
    const BitmapPlan& plan, int64_t block, int64_t token_tile, int64_t split, int64_t warp) {
  BitmapPart part{};
  part.row_tile = block * plan.per_block + warp / plan.parts;
  part.token = token_tile * plan.tokens();
  if (part.row_tile >= plan.row_tiles) return part;
  const int64_t number = split * plan.parts + warp % plan.parts, of = plan.splits * plan.parts;
  part.first = plan.col_tiles * number / of;
  part.last = plan.col_tiles * (number + 1) / of;
  return part;
}

struct BitmapJob {
  BitmapWeight weight;
  const uint16_t* x;     // [m, K]
  const uint16_t* bias;  // [N], or null
  uint16_t* y;           // [m, N]
  float* partial;        // [splits, m, N], null where K is not split
  int64_t m;
  BitmapPlan plan;
  Epilogue epilogue;
  bool wide;
};

// What a lane holds in registers. B is loaded for up to two groups of tokens before it is needed.
template <int T>
struct BitmapLane {
  static constexpr int kAhead = T < 2 ? T : 2;

  float sum[T][4];
  uint32_t x[kAhead][8];
  uint32_t words[16];
  uint32_t bits;
  int64_t before;
};

template <typename Warp>
SB_HOST_DEVICE void bitmap_stage(
    Warp& warp, const BitmapWeight& weight, BitmapStage& stage, int64_t tile, int64_t begin, int64_t end) {
  warp.lanes([&](int64_t lane, auto&) {
    warp.copy4(&stage.bits[lane], global(weight.bits) + tile * kBitmapLanes + lane);
    const int64_t first = begin / kBitmapChunk * kBitmapChunk, most = first + kBitmapMost + kBitmapChunk;
    const int64_t last = at_most(end, most);
    // Mostly one turn: a tile of 256 kept weights.
#pragma unroll 1
    for (int64_t at = first + lane * kBitmapChunk; at < last; at += kBitmapLanes * kBitmapChunk) {
      const int64_t left = weight.nnz - at;
      const auto bytes = static_cast<uint32_t>(2 * at_most(left, kBitmapChunk));
      warp.copy16(&stage.values[at - first], global(weight.values) + at, bytes);
    }
  });
}

// The lanes' operands out of a tile that has come.
template <typename Warp>
SB_HOST_DEVICE void bitmap_operands(Warp& warp, const BitmapStage& stage, int64_t begin) {
  warp.lanes([&](int64_t lane, auto& own) { own.bits = stage.bits[lane]; });
  warp.count_before();
  warp.lanes([&](int64_t, auto& own) {
    bitmap_fragment(own.bits, stage.values + begin % kBitmapChunk + own.before, own.words);
  });
}

template <int T, typename Warp>
SB_HOST_DEVICE void bitmap_load_x(Warp& warp, const BitmapJob& job, const BitmapPart& part, int64_t tile, int group) {
  warp.lanes([&](int64_t lane, auto& own) {
    // A row of x that is not there gives sums that nobody reads; any row will do for it.
    const int64_t token = at_most(part.token + 8 * group + lane / 4, job.m - 1);
    load_sixteen(
        job.x + token * job.weight.k, tile * kBitmapCols + 16 * (lane % 4), job.weight.k, job.wide,
        own.x[group % BitmapLane<T>::kAhead]);
  });
}

// One warp's sums, left in `sums` [tokens, kBitmapPitch] after every warp of the block has come so far.
template <int T, typename Warp>
SB_HOST_DEVICE void bitmap_multiply(Warp& warp, const BitmapJob& job, const BitmapPart& part, BitmapStage* stages) {
  constexpr int kAhead = BitmapLane<T>::kAhead;
  const int64_t row = part.row_tile * job.plan.col_tiles;
  warp.lanes([&](int64_t, auto& own) {
#pragma unroll
    for (int j = 0; j < T; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) own.sum[j][i] = 0.0f;
    }
  });
  // begin[i]: the first value of tile + i; known a turn before it is needed.
  int64_t begin[kBitmapStages + 1];
#pragma unroll
  for (int64_t i = 0; i <= kBitmapStages; ++i) begin[i] = job.weight.start(row + part.first + i);
#pragma unroll
  for (int64_t i = 0; i < kBitmapStages - 1; ++i) {
    const int64_t tile = part.first + i;
    if (tile < part.last) bitmap_stage(warp, job.weight, stages[i], row + tile, begin[i], begin[i + 1]);
    warp.commit();
  }
  int64_t slot = 0;
  for (int64_t tile = part.first; tile < part.last; ++tile) {
    warp.wait();
    // The lanes have left the stage that is filled now.
    const int64_t coming = tile + kBitmapStages - 1, free = slot == 0 ? kBitmapStages - 1 : slot - 1;
    if (coming < part.last) {
      bitmap_stage(
          warp, job.weight, stages[free], row + coming, begin[kBitmapStages - 1], begin[kBitmapStages]);
    }
    warp.commit();
#pragma unroll
    for (int j = 0; j < kAhead; ++j) bitmap_load_x<T>(warp, job, part, tile, j);
    bitmap_operands(warp, stages[slot], begin[0]);
#pragma unroll
    for (int i = 0; i < kBitmapStages; ++i) begin[i] = begin[i + 1];
    begin[kBitmapStages] = job.weight.start(row + tile + 1 + kBitmapStages);
#pragma unroll
    for (int j = 0; j < T; ++j) {
      warp.template multiply<kAhead>(j);
      if (j + kAhead < T) bitmap_load_x<T>(warp, job, part, tile, j + kAhead);
    }
    slot = slot + 1 == kBitmapStages ? 0 : slot + 1;
  }
}

template <int T, typename Warp>
SB_HOST_DEVICE void bitmap_publish(Warp& warp, float* sums) {
  warp.lanes([&](int64_t lane, auto& own) {
#pragma unroll
    for (int j = 0; j < T; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[(8 * j + 2 * (lane % 4) + i % 2) * kBitmapPitch + lane / 4 + 8 * (i / 2)] = own.sum[j][i];
      }
    }
  });
}

SB_HOST_DEVICE inline void bitmap_finish(Float type, const BitmapJob& job, int64_t token, int64_t row, float sum) {
  if (job.bias != nullptr) sum += from_16(type, job.bias[row]);
  job.y[token * job.weight.n + row] = to_16(type, activate(job.epilogue, sum));
}

// What a thread of a block adds up of its warps' sums, part after part.
SB_HOST_DEVICE inline void bitmap_add(
    Float type, const BitmapJob& job, int64_t block, int64_t token_tile, int64_t split, const float* sums,
    int64_t thread, int64_t threads) {
  const int64_t tokens = job.plan.tokens(), of_warp = tokens * kBitmapPitch;
  for (int64_t i = thread; i < job.plan.per_block * tokens * kBitmapRows; i += threads) {
    const int64_t group = i / (tokens * kBitmapRows), token = token_tile * tokens + i / kBitmapRows % tokens;
    const int64_t row = (block * job.plan.per_block + group) * kBitmapRows + i % kBitmapRows;
    if (row >= job.weight.n || token >= job.m) continue;
    const float* own =
        sums + group * job.plan.parts * of_warp + i / kBitmapRows % tokens * kBitmapPitch + i % kBitmapRows;
    float sum = 0.0f;
    for (int64_t part = 0; part < job.plan.parts; ++part) sum += own[part * of_warp];
    if (job.partial == nullptr) {
      bitmap_finish(type, job, token, row, sum);
    } else {
      job.partial[(split * job.m + token) * job.weight.n + row] = sum;
    }
  }
}

// The second stage, where K was split.
SB_HOST_DEVICE inline void bitmap_add_splits(Float type, const BitmapJob& job, int64_t thread, int64_t threads) {
  const int64_t total = job.m * job.weight.n;
  for (int64_t i = thread; i < total; i += threads) {
    float sum = 0.0f;
    for (int64_t split = 0; split < job.plan.splits; ++split) sum += job.partial[split * total + i];
    bitmap_finish(type, job, i / job.weight.n, i % job.weight.n, sum);
  }
}

// A tile of the dense weight, by one warp.
template <typename Warp>
SB_HOST_DEVICE void bitmap_write_tile(
    Warp& warp, const BitmapWeight& weight, BitmapStage& stage, int64_t tile, uint16_t* dense, bool wide) {
  const int64_t begin = weight.start(tile);
  bitmap_stage(warp, weight, stage, tile, begin, weight.start(tile + 1));
  warp.commit();
  warp.wait_all();
  bitmap_operands(warp, stage, begin);
  const int64_t cols = weight.col_tiles();
  warp.lanes([&](int64_t lane, auto& own) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = tile / cols * kBitmapRows + lane / 4 + 8 * h;
      if (row >= weight.n) continue;
      uint32_t words[8];
#pragma unroll
      for (int w = 0; w < 8; ++w) words[w] = own.words[2 * w + h];
      store_sixteen(dense + row * weight.k, tile % cols * kBitmapCols + 16 * (lane % 4), weight.k, wide, words);
    }
  });
  // The stage is free again once all have read it.
  warp.meet();
}

// The values of a tile out of a dense matrix, by one warp; `values` as `weight.nnz` and its starts say.
template <typename Warp>
SB_HOST_DEVICE void bitmap_read_tile(
    Warp& warp, const BitmapWeight& weight, BitmapStage& stage, int64_t tile, const uint16_t* dense, bool wide,
    uint16_t* values) {
  const int64_t begin = weight.start(tile), cols = weight.col_tiles();
  const int64_t count = at_most(weight.start(tile + 1) - begin, kBitmapMost);
  warp.lanes([&](int64_t lane, auto& own) {
    own.bits = global(weight.bits)[tile * kBitmapLanes + lane];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = tile / cols * kBitmapRows + lane / 4 + 8 * h;
      uint32_t words[8] = {};
      if (row < weight.n) {
        load_sixteen(dense + row * weight.k, tile % cols * kBitmapCols + 16 * (lane % 4), weight.k, wide, words);
      }
#pragma unroll
      for (int w = 0; w < 8; ++w) own.words[2 * w + h] = words[w];
    }
  });
  warp.count_before();
  // By way of shared memory: a lane's values lie far from those of the next.
  warp.lanes([&](int64_t, auto& own) {
    uint16_t* to = stage.values + own.before;
#pragma unroll
    for (int bit = 0; bit < 32; ++bit) {
      if (((own.bits >> bit) & 1u) != 0) *to++ = static_cast<uint16_t>(own.words[bit / 2] >> (16 * (bit % 2)));
    }
  });
  warp.meet();
  warp.lanes([&](int64_t lane, auto&) {
    for (int64_t i = lane; i < count; i += kBitmapLanes) global(values)[begin + i] = stage.values[i];
  });
  // The stage is free again once all have read it.
  warp.meet();
}

}  // namespace sparsebert
