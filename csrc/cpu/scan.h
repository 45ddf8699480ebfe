// Passes over fp32 scores: count and collect around a bracket, compare and pack to bits, n:m groups to bits.

#pragma once

#include <cstdint>

#include "isa.h"
#include "select_digits.h"

namespace sparsebert {

struct BracketCount {
  int64_t less = 0;      // x < low
  int64_t at_low = 0;    // x == low
  int64_t interior = 0;  // low < x < high, copied to the buffer as long as there is room
  int64_t at_high = 0;   // x == high and high != low
  bool nan = false;
};

struct ScanKernels {
  // `buffer` has room for capacity + 16 floats; the first min(interior, capacity) are written in order.
  BracketCount (*count_bracket)(const float* x, int64_t n, float low, float high, float* buffer, int64_t capacity);
  int64_t (*count_equal)(const float* x, int64_t n, float value);
  // Bit i = x[i] > value, or >= with or_equal; the last byte is padded with 0. Returns whether a NaN was seen.
  bool (*pack_above)(const float* x, int64_t n, float value, bool or_equal, uint8_t* bits);
  // The `keep` largest of each `m`, later ones first among equals, and all above `floor`. `groups` groups whose bits
  // start on a byte. Returns whether a NaN was seen.
  bool (*pack_groups)(const float* x, int64_t groups, int keep, int m, float floor, uint8_t* bits);
};

const ScanKernels& scan_kernels(Isa isa);

}  // namespace sparsebert
