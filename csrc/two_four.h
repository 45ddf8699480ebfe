// 2:4 weights as Hopper's sparse matrix units read them, for the device and for the host's tests alike.
//
// A block multiplies 128 rows of the weight [N, K] by 128 rows of x ("tokens" here), 64 columns of K at a step: two
// warpgroups of 64 rows, two products of 32 columns each (wgmma.mma_async.sp m64n128k32). The weight is the product's
// left operand, the only one that may be sparse, so the sums come transposed and are turned on their way to y.
//
// A weight is packed once: for each 128 rows and 64 columns 8 KB of values, as core matrices of 8 rows by 16 bytes, and
// 1 KB of positions, a word to each thread of each warpgroup. That is copied as it lies, and x by a tensor map.
//
// What does not fit into 2:4, a residue of some thousandths, is multiplied by the same units: each warpgroup gathers the
// columns of x that its 64 rows have residue in, out of the steps as they pass, and every few steps multiplies them, as
// dense operands of 16 columns each.

#pragma once

#include <cstdint>

#include "activate.h"
#include "floats.h"
#include "grid.h"

namespace sparsebert {

struct TwoFour {
  static constexpr int64_t kRows = 128, kTokens = 128, kCols = 64;
  static constexpr int64_t kGroups = 2, kGroupRows = 64, kGroupThreads = 128;  // warpgroups
  static constexpr int64_t kHalves = 2, kHalfCols = 32;                        // products to a step
  // Bytes of a step: x, the packed values, their positions.
  static constexpr int64_t kTokenPitch = 2 * kCols, kTokenBytes = kTokens * kTokenPitch;
  static constexpr int64_t kValueBytes = kRows * kCols, kMetaBytes = kRows * kCols / 8;
  static constexpr int64_t kPackedBytes = kValueBytes + kMetaBytes;
  static constexpr int64_t kStageBytes = kTokenBytes + kPackedBytes;
  static constexpr int64_t kStages = 4, kStagesBesideResidue = 3;
  // A row of y in shared memory has 16 bytes more than rows of the weight, for its banks.
  static constexpr int64_t kPitch = 2 * kRows + 16;
  static constexpr int64_t kUnit = 8;  // entries of 16 bits to 16 bytes
  // Columns of x that a warpgroup gathers at most before it multiplies them ("slots"), and those to a product.
  static constexpr int64_t kSlots = 64, kSlotsOfProduct = 16, kSlotBytes = 2 * kSlots * kTokens;
};
// y takes the stages' place.
static_assert(TwoFour::kTokens * TwoFour::kPitch <= TwoFour::kStagesBesideResidue * TwoFour::kStageBytes);
// A swizzled operand begins where the swizzle does, in every stage.
static_assert(TwoFour::kStageBytes % 1024 == 0);

struct TwoFourShape {
  int64_t n;
  int64_t k;

  SB_HOST_DEVICE int64_t row_tiles() const { return (n + TwoFour::kRows - 1) / TwoFour::kRows; }
  SB_HOST_DEVICE int64_t steps() const { return (k + TwoFour::kCols - 1) / TwoFour::kCols; }
  SB_HOST_DEVICE int64_t packed_bytes() const { return row_tiles() * steps() * TwoFour::kPackedBytes; }
};

// ---- Packing ----

struct TwoFourPack {
  TwoFourShape shape;
  const uint16_t* values;    // [N, K / 2]
  const uint8_t* positions;  // [N, ceil(K / 8)]
  uint8_t* packed;
};

// The two positions of a group of four columns: four bits. A group that is not there has two places with zeros in them.
SB_HOST_DEVICE inline uint32_t two_four_code(const TwoFourPack& job, int64_t row, int64_t group) {
  const int64_t groups = job.shape.k / 4;
  if (row >= job.shape.n || group >= groups) return 4u;
  const uint32_t byte = global(job.positions)[row * ((groups + 1) / 2) + group / 2];
  return (byte >> (4 * (group % 2))) & 15u;
}

// What thread `thread` of a warpgroup holds of the positions of a step: those of rows r and r + 8, 16 columns. Of four
// threads the first two have the columns of the step's first product, the others those of its second.
SB_HOST_DEVICE inline uint32_t two_four_meta(const TwoFourPack& job, int64_t first_row, int64_t step, int64_t thread) {
  const int64_t row = first_row + 16 * (thread / 32) + thread % 32 / 4;
  const int64_t col = step * TwoFour::kCols + TwoFour::kHalfCols * (thread / 2 % 2) + 16 * (thread % 2);
  uint32_t word = 0;
  for (int64_t i = 0; i < 8; ++i) word |= two_four_code(job, row + 8 * (i / 4), col / 4 + i % 4) << (4 * i);
  return word;
}

// Unit `unit`, 16 bytes, of the packed weight. Of a tile's values: warpgroup, product, half of its columns, row.
SB_HOST_DEVICE inline Words two_four_unit(const TwoFourPack& job, int64_t unit) {
  constexpr int64_t kUnits = TwoFour::kPackedBytes / 16, kValues = TwoFour::kValueBytes / 16;
  const int64_t tile = unit / kUnits, at = unit % kUnits, steps = job.shape.steps();
  const int64_t first_row = tile / steps * TwoFour::kRows, step = tile % steps;
  Words words{};
  if (at >= kValues) {
    const int64_t thread = (at - kValues) * 4;
#pragma unroll
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t group = (thread + i) / TwoFour::kGroupThreads;
      words.word[i] = two_four_meta(
          job, first_row + group * TwoFour::kGroupRows, step, (thread + i) % TwoFour::kGroupThreads);
    }
    return words;
  }
  const int64_t row = first_row + at / 256 * TwoFour::kGroupRows + at % 64;
  const int64_t col = step * TwoFour::kCols / 2 + at / 128 % 2 * 16 + at / 64 % 2 * 8, cols = job.shape.k / 2;
  if (row >= job.shape.n) return words;
#pragma unroll
  for (int64_t i = 0; i < 8; ++i) {
    const uint32_t value = col + i < cols ? global(job.values)[row * cols + col + i] : 0u;
    words.word[i / 2] |= value << (16 * (i % 2));
  }
  return words;
}

// ---- The product ----

// Which slots a step of a group of 64 rows fills: a word.
struct TwoFourSpan {
  uint32_t word;

  SB_HOST_DEVICE uint32_t first() const { return word & 255u; }
  SB_HOST_DEVICE uint32_t end() const {
    const uint32_t end = first() + (word >> 8 & 127u), most = static_cast<uint32_t>(TwoFour::kSlots);
    return end < most ? end : most;
  }
  SB_HOST_DEVICE bool ends_chunk() const { return (word >> 15 & 1u) != 0; }
  SB_HOST_DEVICE uint32_t chunk() const { return word >> 16; }
};

// The residue of a packed weight, by groups of 64 rows and chunks of a few steps; each chunk has at most 64 slots.
struct TwoFourResidue {
  const uint32_t* spans;   // [groups, steps]
  const uint8_t* columns;  // [groups, chunks, 64]: a slot's column within its step
  const uint16_t* values;  // [groups, chunks, products, 128, 8]: what each thread holds of a dense operand
  int64_t chunks;
  int64_t products;  // to a chunk

  SB_HOST_DEVICE TwoFourSpan span(int64_t group, int64_t steps, int64_t step) const {
    return {global(spans)[group * steps + step]};
  }
  SB_HOST_DEVICE const uint8_t* slots(int64_t group, TwoFourSpan span) const {
    return global(columns) + (group * chunks + span.chunk()) * TwoFour::kSlots;
  }
  SB_HOST_DEVICE const Words* operand(int64_t group, TwoFourSpan span, int64_t product, int64_t thread) const {
    const int64_t at = (group * chunks + span.chunk()) * products + product;
    return reinterpret_cast<const Words*>(global(values)) + at * TwoFour::kGroupThreads + thread;
  }
};

struct TwoFourJob {
  TwoFourShape shape;
  int64_t m;
  const uint8_t* packed;
  const uint16_t* bias;  // [N], or null
  uint16_t* y;           // [m, N], aligned to 16 bytes; N is a multiple of 8
  TwoFourResidue residue;  // whose `values` are null where there is none
  // Blocks of a cluster: so many below one another in the weight, with the same tokens, times so many with the same
  // rows of the weight. Each fetches its share of what it has in common with others for all of them.
  int64_t down;
  int64_t across;

  SB_HOST_DEVICE int64_t token_tiles() const { return (m + TwoFour::kTokens - 1) / TwoFour::kTokens; }
  SB_HOST_DEVICE int64_t cluster() const { return down * across; }
  // Whole clusters, a few of whose blocks may have no tokens.
  int64_t blocks() const { return shape.row_tiles() * ((token_tiles() + across - 1) / across * across); }

  // At most eight blocks, which every device can place; rows of tiles are shared evenly, and of the tiles of tokens at
  // most an eighth is added.
  void choose_cluster() {
    const int64_t tall = shape.row_tiles(), tiles = token_tiles();
    down = tall % 4 == 0 ? 4 : tall % 2 == 0 ? 2 : 1;
    across = 8 / down;
    while (across > 1 && ((tiles + across - 1) / across * across - tiles) * 8 > tiles) across /= 2;
  }
};

// What block `block` computes, and its place in its cluster. Clusters that follow one another share their tokens.
struct TwoFourTile {
  int64_t row_tile;
  int64_t token;
  int64_t row_rank;
  int64_t token_rank;

  SB_HOST_DEVICE TwoFourTile(const TwoFourJob& job, int64_t block) {
    const int64_t rank = block % job.cluster(), cluster = block / job.cluster();
    const int64_t tall = job.shape.row_tiles() / job.down;
    row_rank = rank % job.down;
    token_rank = rank / job.down;
    row_tile = cluster % tall * job.down + row_rank;
    token = (cluster / tall * job.across + token_rank) * TwoFour::kTokens;
  }
  // The blocks with the same tokens, and those with the same rows of the weight: a bit to each rank.
  SB_HOST_DEVICE uint32_t same_tokens(const TwoFourJob& job) const {
    return ((1u << job.down) - 1u) << (token_rank * job.down);
  }
  SB_HOST_DEVICE uint32_t same_rows(const TwoFourJob& job) const {
    uint32_t mask = 0;
    for (int64_t i = 0; i < job.across; ++i) mask |= 1u << (i * job.down + row_rank);
    return mask;
  }
  // Rank `i` of `partners` whose copies come here: those are told when a stage is free.
  SB_HOST_DEVICE static int64_t partners(const TwoFourJob& job) { return job.down + job.across - 1; }
  SB_HOST_DEVICE int64_t partner(const TwoFourJob& job, int64_t i) const {
    if (i < job.down) return token_rank * job.down + i;
    const int64_t other = i - job.down;
    return (other < token_rank ? other : other + 1) * job.down + row_rank;
  }
};

// A block's share of a step: of the tokens, and of the packed weight.
struct TwoFourShare {
  int64_t tokens;       // so many rows of x
  int64_t token;        // from this one on
  int64_t tokens_at;    // bytes into a stage
  int64_t bytes;        // of the packed weight
  const uint8_t* from;
  int64_t bytes_at;     // bytes into a stage

  SB_HOST_DEVICE TwoFourShare(const TwoFourJob& job, const TwoFourTile& tile, int64_t step) {
    tokens = TwoFour::kTokens / job.down;
    token = tile.token + tile.row_rank * tokens;
    tokens_at = tile.row_rank * tokens * TwoFour::kTokenPitch;
    bytes = TwoFour::kPackedBytes / job.across;
    const int64_t skip = tile.token_rank * bytes;
    from = global(job.packed) + (tile.row_tile * job.shape.steps() + step) * TwoFour::kPackedBytes + skip;
    bytes_at = TwoFour::kTokenBytes + skip;
  }
};

// An operand in shared memory, as the matrix unit is told of it (PTX ISA, "matrix descriptor format"): where it begins,
// bytes from one core matrix to the next along K and along the rows, and the swizzle (0: none, 1: of 128 bytes).
SB_HOST_DEVICE inline uint64_t operand(uint32_t address, uint64_t along_k, uint64_t along_rows, uint64_t swizzle) {
  return (static_cast<uint64_t>(address & 0x3ffffu) >> 4) | (along_k >> 4) << 16 | (along_rows >> 4) << 32 |
         swizzle << 62;
}

// Of 64 rows of the weight and half a step: 16 stored columns, 32 bytes.
SB_HOST_DEVICE inline uint64_t two_four_weight(uint32_t stage, int64_t group, int64_t half) {
  const auto offset = static_cast<uint32_t>(TwoFour::kTokenBytes + (group * TwoFour::kHalves + half) * 2048);
  return operand(stage + offset, 1024, 128, 0);
}

// Of all tokens and half a step: 32 columns, 64 of the 128 bytes of a row. A swizzled operand has no step along K.
SB_HOST_DEVICE inline uint64_t two_four_tokens(uint32_t stage, int64_t half) {
  return operand(stage + static_cast<uint32_t>(half * 2 * TwoFour::kHalfCols), 16, 8 * TwoFour::kTokenPitch, 1);
}

// Where column `col` of a step lies in a stage, for token `token`: a tensor map swizzles 16 bytes among eight.
SB_HOST_DEVICE inline uint32_t two_four_entry_at(int64_t token, int64_t col) {
  return static_cast<uint32_t>(token * TwoFour::kTokenPitch + ((2 * col) ^ (token % 8 * 16)));
}

// Where slot `slot` of a warpgroup lies for token `token`: core matrices of 8 tokens by 16 bytes, without a swizzle.
SB_HOST_DEVICE inline uint32_t two_four_slot_at(int64_t slot, int64_t token) {
  return static_cast<uint32_t>(slot / 8 * 16 * TwoFour::kTokens + token * 16 + 2 * (slot % 8));
}

// Of all tokens and 16 slots.
SB_HOST_DEVICE inline uint64_t two_four_slots(uint32_t slots, int64_t product) {
  return operand(slots + static_cast<uint32_t>(product * 32 * TwoFour::kTokens), 16 * TwoFour::kTokens, 128, 0);
}

// Where a thread's word of positions lies in a stage.
SB_HOST_DEVICE inline int64_t two_four_meta_at(int64_t group, int64_t thread) {
  return TwoFour::kTokenBytes + TwoFour::kValueBytes + 4 * (group * TwoFour::kGroupThreads + thread);
}

// ---- From the sums to y ----

// What a lane holds in registers: of rows lane / 4 and 8 more, two of every eight tokens; and what it hands on.
struct TwoFourLane {
  float sum[64];
  float shift[2];
  uint32_t words[4];
  uint32_t to;  // bytes from the first row of y in shared memory
};

SB_HOST_DEVICE inline uint32_t pair_of(Float type, float low, float high) {
  return to_16(type, low) | static_cast<uint32_t>(to_16(type, high)) << 16;
}

// A warp's 16 rows of 128 tokens, with bias and activation, to shared memory: a row to a token, kPitch bytes from one
// to the next.
template <Epilogue kEpilogue, Float kType, typename Warp>
SB_HOST_DEVICE void two_four_publish(Warp& warp, const TwoFourJob& job, int64_t row_tile) {
  warp.lanes([&](int64_t lane, TwoFourLane& own) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = row_tile * TwoFour::kRows + 16 * warp.number() + lane / 4 + 8 * i;
      own.shift[i] = job.bias != nullptr && row < job.shape.n ? from_16(kType, global(job.bias)[row]) : 0.0f;
    }
    // Of the four matrices of 8 x 8 that are turned, lane / 8 is the one whose row this lane names.
    const int64_t token = 8 * (lane / 16) + lane % 8;
    own.to = static_cast<uint32_t>(token * TwoFour::kPitch + 2 * (16 * warp.number() + 8 * (lane / 8 % 2)));
  });
  // Turn after turn the next sums move to the front: unrolled, all activations would be under way at once, for which
  // there are no registers.
#pragma unroll 1
  for (int64_t first = 0; first < TwoFour::kTokens; first += 32) {
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      warp.lanes([&](int64_t, TwoFourLane& own) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* sum = own.sum + 8 * p + 4 * (i / 2) + 2 * (i % 2);
          const float shift = own.shift[i % 2], low = sum[0] + shift, high = sum[1] + shift;
          own.words[i] = pair_of(kType, activate(kEpilogue, low), activate(kEpilogue, high));
        }
      });
      warp.store_turned();
      warp.lanes([&](int64_t, TwoFourLane& own) { own.to += static_cast<uint32_t>(16 * TwoFour::kPitch); });
    }
    warp.lanes([&](int64_t, TwoFourLane& own) {
#pragma unroll
      for (int i = 0; i < 48; ++i) own.sum[i] = own.sum[i + 16];
    });
  }
}

// What a thread of the block writes of y, once all of it lies in shared memory.
SB_HOST_DEVICE inline void two_four_store(
    const TwoFourJob& job, const TwoFourTile& tile, const uint8_t* rows, int64_t thread, int64_t threads) {
  constexpr int64_t kParts = TwoFour::kRows / TwoFour::kUnit;
  for (int64_t i = thread; i < TwoFour::kTokens * kParts; i += threads) {
    const int64_t token = tile.token + i / kParts, row = tile.row_tile * TwoFour::kRows + i % kParts * TwoFour::kUnit;
    if (token >= job.m || row >= job.shape.n) continue;
    *reinterpret_cast<Words*>(global(job.y) + token * job.shape.n + row) =
        *reinterpret_cast<const Words*>(rows + i / kParts * TwoFour::kPitch + i % kParts * 16);
  }
}

}  // namespace sparsebert
