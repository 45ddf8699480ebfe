// Scores as integers in their order, and those integers digit by digit: what a radix selection needs to know of a
// number, for CPU and CUDA alike.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "grid.h"

namespace sparsebert {

// Three digits make up a key. The first holds the sign, the exponent and three bits of the significand, so that of
// scores that are spread at all only a few per cent share the digit of the one looked for.
constexpr int kDigits = 3;
constexpr int kFirstBits = 12;
constexpr int kOtherBits = 10;
constexpr int64_t kFirstBins = int64_t{1} << kFirstBits;
constexpr int64_t kOtherBins = int64_t{1} << kOtherBits;
constexpr int64_t kAllBins = kFirstBins + (kDigits - 1) * kOtherBins;

template <int R>
struct Digit {
  static constexpr int kBits = R == 0 ? kFirstBits : kOtherBits;
  static constexpr int kShift = (kDigits - 1 - R) * kOtherBits;
  static constexpr int64_t kBins = int64_t{1} << kBits;
  // Where this digit's histogram begins among all of them.
  static constexpr int64_t kFirst = R == 0 ? 0 : kFirstBins + (R - 1) * kOtherBins;

  SB_HOST_DEVICE static uint32_t of(uint32_t key) { return (key >> kShift) & static_cast<uint32_t>(kBins - 1); }
  // Whether the digits before this one are those of `prefix`.
  SB_HOST_DEVICE static bool follows(uint32_t key, uint32_t prefix) {
    if constexpr (R == 0) return true;
    else return (key >> (kShift + kBits)) == prefix;
  }
};

SB_HOST_DEVICE inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// In the order of the floats that have these bits; -0.0 counts as 0.0. No float arithmetic: a mode that flushes
// denormals must not change the order.
SB_HOST_DEVICE inline uint32_t key_of(uint32_t bits) {
  const uint32_t positive_zero = bits == 0x80000000u ? 0u : bits;
  return positive_zero ^ ((positive_zero >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}

SB_HOST_DEVICE inline bool is_nan(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

// The largest float that is <= value: for a float x, x > value exactly where x > float_below(value).
inline float float_below(double value) {
  const float near = static_cast<float>(value);
  return static_cast<double>(near) > value ? std::nextafter(near, -std::numeric_limits<float>::infinity()) : near;
}

// Stands where a unit of scores has no element: above the key of every number, so no rank ever reaches it.
constexpr uint32_t kNoKey = 0xffffffffu;
// Not above the key of any number.
constexpr uint32_t kLeastKey = 0;

// The scores of a tensor in units of 8: what one thread takes at a time, and one byte of the mask.
constexpr int kUnit = 8;

SB_HOST_DEVICE inline int64_t units_for(int64_t entries) { return (entries + kUnit - 1) / kUnit; }

// Units [share_begin(b), share_begin(b + 1)) are block b's, the same number to each but for one.
SB_HOST_DEVICE inline int64_t share_begin(int64_t units, int64_t block, int64_t blocks) {
  return units / blocks * block + units % blocks * block / blocks;
}

}  // namespace sparsebert
