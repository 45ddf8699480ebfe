// Eight floats of any of the three types at a time, in host code and device code alike.

#pragma once

#include <cstdint>
#include <cstring>

#include "grid.h"
#include "select_digits.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace sparsebert {

// The order of sparsebert's other lists of types; f16 is for devices only, hosts here never widen it.
enum class Float : uint8_t { f32, bf16, f16 };

SB_HOST_DEVICE inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

SB_HOST_DEVICE inline uint16_t to_bf16(float value) {
#if defined(__CUDA_ARCH__)
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  const uint32_t bits = bits_of(value);
  if (is_nan(bits)) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

SB_HOST_DEVICE inline float from_16(Float type, uint16_t bits) {
#if defined(__CUDA_ARCH__)
  if (type == Float::f16) return __half2float(__ushort_as_half(bits));
#else
  (void)type;
#endif
  return float_of(static_cast<uint32_t>(bits) << 16);
}

SB_HOST_DEVICE inline uint16_t to_16(Float type, float value) {
#if defined(__CUDA_ARCH__)
  if (type == Float::f16) return __half_as_ushort(__float2half_rn(value));
#else
  (void)type;
#endif
  return to_bf16(value);
}

struct alignas(16) Words {
  uint32_t word[4];
};

struct Eight {
  float lane[kUnit];
};

// A pointer out of a table may lead anywhere, for all the compiler knows; the tensors' memory is the device's own.
template <typename T>
SB_HOST_DEVICE T* global(T* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// `count` of the 8 values from `index` on; the others are 0. `wide`: 16-byte loads, for which the pointer at `index`
// must be aligned and all 8 be there.
SB_HOST_DEVICE inline Eight load_eight(Float type, const void* from, int64_t index, int64_t count, bool wide) {
  Eight result;
  if (type == Float::f32) {
    const float* x = static_cast<const float*>(global(from)) + index;
    if (wide) {
      const Words low = *reinterpret_cast<const Words*>(x), high = *reinterpret_cast<const Words*>(x + 4);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        result.lane[j] = float_of(low.word[j]);
        result.lane[j + 4] = float_of(high.word[j]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kUnit; ++j) result.lane[j] = j < count ? x[j] : 0.0f;
    }
    return result;
  }
  const uint16_t* x = static_cast<const uint16_t*>(global(from)) + index;
  if (wide) {
    const Words pairs = *reinterpret_cast<const Words*>(x);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      result.lane[2 * j] = from_16(type, static_cast<uint16_t>(pairs.word[j] & 0xffffu));
      result.lane[2 * j + 1] = from_16(type, static_cast<uint16_t>(pairs.word[j] >> 16));
    }
  } else {
#pragma unroll
    for (int j = 0; j < kUnit; ++j) result.lane[j] = j < count ? from_16(type, x[j]) : 0.0f;
  }
  return result;
}

// The mirror of load_eight: of the 8 values `count` are written.
SB_HOST_DEVICE inline void store_eight(
    Float type, void* to, int64_t index, int64_t count, bool wide, const Eight& values) {
  if (type == Float::f32) {
    float* out = static_cast<float*>(global(to)) + index;
    if (wide) {
      Words low, high;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        low.word[j] = bits_of(values.lane[j]);
        high.word[j] = bits_of(values.lane[j + 4]);
      }
      *reinterpret_cast<Words*>(out) = low;
      *reinterpret_cast<Words*>(out + 4) = high;
    } else {
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        if (j < count) out[j] = values.lane[j];
      }
    }
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(global(to)) + index;
  if (wide) {
    Words pairs;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      pairs.word[j] = to_16(type, values.lane[2 * j]) |
                      (static_cast<uint32_t>(to_16(type, values.lane[2 * j + 1])) << 16);
    }
    *reinterpret_cast<Words*>(out) = pairs;
  } else {
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      if (j < count) out[j] = to_16(type, values.lane[j]);
    }
  }
}

// Lanes whose bit of `kept` is 0 become exact zeros, whatever they were.
SB_HOST_DEVICE inline Eight keep_lanes(const Eight& values, uint32_t kept) {
  Eight result;
#pragma unroll
  for (int j = 0; j < kUnit; ++j) result.lane[j] = ((kept >> j) & 1u) != 0 ? values.lane[j] : 0.0f;
  return result;
}

// Bit j of the result: whether the cell of matrix element `index + j` is kept, for the `count` that are there.
SB_HOST_DEVICE inline uint32_t kept_of_matrix(const uint8_t* bits, const Grid& grid, int64_t index, int64_t count) {
  const int64_t cols = grid.matrix_cols();
  int64_t row = index / cols, col = index % cols;
  // Where in its block the element is: steps instead of a division for each.
  int64_t across = col % grid.width, cell = grid.cell(row, col);
  uint32_t kept = 0;
  for (int j = 0; j < kUnit; ++j) {
    if (j >= count) break;
    kept |= static_cast<uint32_t>(is_kept(global(bits), cell)) << j;
    if (++col == cols) {
      col = across = 0;
      cell = grid.cell(++row, 0);
    } else if (++across == grid.width) {
      across = 0;
      ++cell;
    }
  }
  return kept;
}

}  // namespace sparsebert
