// n:m masks as a grid of blocks makes them: of every m consecutive scores the n largest are kept, the later ones first
// among equals, and all above a limit. Where a byte of the mask holds whole groups (m of 2, 4 and 8) a thread needs
// nothing but its own 8 scores; other groups are laid out in the block's shared memory.

#pragma once

#include <cstdint>
#include <limits>
#include <optional>

#include "blocks.h"
#include "floats.h"
#include "select_digits.h"

namespace sparsebert {

struct NmJob {
  const float* scores;
  int64_t count;
  int64_t m;
  int64_t keep;
  uint32_t limit;  // keys above it are kept whatever their rank
  uint8_t* bits;
  uint64_t* nan;  // becomes 1 where there is one
  bool wide;      // 16-byte loads
};

struct NmShared {
  static constexpr int64_t kScores = 4096;
  static constexpr int64_t kBanks = 32;

  uint32_t key[kScores + kScores / kBanks];

  // A gap after every 32, so that groups of 32 do not all begin in the same bank.
  SB_HOST_DEVICE static int64_t place(int64_t i) { return i + i / kBanks; }
};

// The key above which scores are kept whatever their rank; without a threshold, that of infinity: none is above.
inline uint32_t nm_limit(std::optional<double> threshold) {
  return key_of(bits_of(threshold ? float_below(*threshold) : std::numeric_limits<float>::infinity()));
}

// Scores that a block takes at a time: whole groups, and whole bytes of the mask.
SB_HOST_DEVICE inline int64_t nm_tile(int64_t m) { return NmShared::kScores / (kUnit * m) * (kUnit * m); }

// Whether score i ranks before score j, both of one group.
SB_HOST_DEVICE inline bool ranks_before(uint32_t key_i, int64_t i, uint32_t key_j, int64_t j) {
  return key_i > key_j || (key_i == key_j && i > j);
}

template <int M>
SB_HOST_DEVICE uint32_t nm_byte(const uint32_t (&key)[kUnit], int64_t keep, uint32_t limit, int64_t count) {
  uint32_t kept = 0;
#pragma unroll
  for (int j = 0; j < kUnit; ++j) {
    int64_t better = 0;
#pragma unroll
    for (int r = 1; r < M; ++r) {
      const int i = j / M * M + (j + r) % M;
      better += ranks_before(key[i], i, key[j], j) ? 1 : 0;
    }
    kept |= static_cast<uint32_t>((better < keep || key[j] > limit) && j < count) << j;
  }
  return kept;
}

// m of 2, 4 or 8.
template <int M, typename Block>
SB_HOST_DEVICE void nm_units(Block& block, const NmJob& job) {
  static_assert(kUnit % M == 0);
  block.threads([&](int64_t thread) {
    const int64_t units = units_for(job.count);
    for (int64_t unit = block.id * block.size + thread; unit < units; unit += block.blocks * block.size) {
      const int64_t left = job.count - unit * kUnit, count = left < kUnit ? left : kUnit;
      const Eight x = load_eight(Float::f32, job.scores, unit * kUnit, count, job.wide && count == kUnit);
      uint32_t key[kUnit];
      bool nan = false;
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        key[j] = key_of(bits_of(x.lane[j]));
        nan = nan || is_nan(bits_of(x.lane[j]));
      }
      if (nan) atomic_most(job.nan, 1);
      job.bits[unit] = static_cast<uint8_t>(nm_byte<M>(key, job.keep, job.limit, count));
    }
  });
}

// Any m up to 32.
template <typename Block>
SB_HOST_DEVICE void nm_tiles(Block& block, const NmJob& job) {
  const int64_t tile = nm_tile(job.m);
  const auto m = static_cast<uint32_t>(job.m);
  uint32_t* key = block.shared.key;
  for (int64_t first = block.id * tile; first < job.count; first += block.blocks * tile) {
    const int64_t left = job.count - first, here = left < tile ? left : tile;
    block.threads([&](int64_t thread) {
      bool nan = false;
      for (int64_t i = thread; i < here; i += block.size) {
        const uint32_t bits = bits_of(job.scores[first + i]);
        nan = nan || is_nan(bits);
        key[NmShared::place(i)] = key_of(bits);
      }
      if (nan) atomic_most(job.nan, 1);
    });
    block.threads([&](int64_t thread) {
      for (int64_t unit = thread; unit < units_for(here); unit += block.size) {
        uint32_t kept = 0;
        for (int j = 0; j < kUnit; ++j) {
          const auto i = static_cast<uint32_t>(unit * kUnit + j);
          if (i >= here) break;
          const uint32_t group = i / m * m, own = key[NmShared::place(i)];
          int64_t better = 0;
          for (uint32_t other = group; other < group + m; ++other) {
            better += ranks_before(key[NmShared::place(other)], other, own, i) ? 1 : 0;
          }
          kept |= static_cast<uint32_t>(better < job.keep || own > job.limit) << j;
        }
        job.bits[first / kUnit + unit] = static_cast<uint8_t>(kept);
      }
    });
  }
}

template <typename Block>
SB_HOST_DEVICE void run_nm(Block& block, const NmJob& job) {
  if (job.m == 2) nm_units<2>(block, job);
  else if (job.m == 4) nm_units<4>(block, job);
  else if (job.m == 8) nm_units<8>(block, job);
  else nm_tiles(block, job);
}

}  // namespace sparsebert
