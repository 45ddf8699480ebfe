#include "rows.h"

#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>

namespace sparsebert {
namespace {

// A dtype as the unsigned integer it is stored in: selecting under a mask is then an AND, which vectorises for every
// pair of dtypes and keeps nothing of a NaN where the mask is 0.
struct F32 {
  using Storage = uint32_t;
};
struct Bf16 {
  using Storage = uint16_t;
};
struct Fp16 {
  using Storage = uint16_t;
};

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

template <typename T>
inline float decode(typename T::Storage bits) {
  if constexpr (std::is_same_v<T, F32>) return as_float(bits);
  else if constexpr (std::is_same_v<T, Bf16>) return as_float(static_cast<uint32_t>(bits) << 16);
  else return c10::detail::fp16_ieee_to_fp32_value(bits);
}

template <typename T>
inline typename T::Storage encode(float value) {
  const uint32_t bits = as_bits(value);
  if constexpr (std::is_same_v<T, F32>) {
    return bits;
  } else if constexpr (std::is_same_v<T, Bf16>) {
    // Round to nearest even, as torch does; a NaN stays one (rounding its bits up could make it an infinity).
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  } else {
    return c10::detail::fp16_ieee_from_fp32_value(value);
  }
}

// Same dtype: the bits as they are, so that a NaN keeps its payload.
template <typename In, typename Out>
inline typename Out::Storage convert(typename In::Storage bits) {
  if constexpr (std::is_same_v<In, Out>) return bits;
  else return encode<Out>(decode<In>(bits));
}

template <typename F>
inline void with_type(Dtype dtype, F&& f) {
  if (dtype == Dtype::f32) f(F32{});
  else if (dtype == Dtype::bf16) f(Bf16{});
  else f(Fp16{});
}

template <typename F>
inline void with_types(Dtype first, Dtype second, F&& f) {
  with_type(first, [&](auto a) { with_type(second, [&](auto b) { f(a, b); }); });
}

#define SB_NAMESPACE generic
#define SB_TARGET SB_TARGET_GENERIC
#include "rows.inc"
#undef SB_NAMESPACE
#undef SB_TARGET

#define SB_NAMESPACE avx2
#define SB_TARGET SB_TARGET_AVX2
#include "rows.inc"
#undef SB_NAMESPACE
#undef SB_TARGET

#define SB_NAMESPACE avx512
#define SB_TARGET SB_TARGET_AVX512
#include "rows.inc"
#undef SB_NAMESPACE
#undef SB_TARGET

constexpr std::array<uint64_t, 256> byte_table() {
  std::array<uint64_t, 256> table{};
  for (int byte = 0; byte < 256; ++byte) {
    for (int bit = 0; bit < 8; ++bit) table[byte] |= static_cast<uint64_t>((byte >> bit) & 1) << (8 * bit);
  }
  return table;
}

constexpr std::array<uint64_t, 256> kBytes = byte_table();

}  // namespace

const RowKernels& row_kernels(Isa isa) {
  if (isa == Isa::avx512) return avx512::kernels;
  if (isa == Isa::avx2) return avx2::kernels;
  return generic::kernels;
}

void expand_bits(const uint8_t* bits, int64_t first, int64_t n, uint8_t* keep) {
  const int shift = first & 7;
  const uint8_t* byte = bits + (first >> 3);
  for (int64_t i = 0; i < n; i += 8, ++byte) {
    uint32_t eight = byte[0] >> shift;
    // The next byte is read only where a wanted bit is in it: it may lie past the end.
    if (shift != 0 && n - i > 8 - shift) eight |= static_cast<uint32_t>(byte[1]) << (8 - shift);
    const uint64_t spread = kBytes[eight & 0xff];
    std::memcpy(keep + i, &spread, 8);
  }
}

void expand_row(const uint8_t* bits, const Grid& grid, int64_t grid_row, uint8_t* scratch, uint8_t* keep) {
  if (grid.width == 1) {
    expand_bits(bits, grid_row * grid.cols, grid.cols, keep);
    return;
  }
  expand_bits(bits, grid_row * grid.cols, grid.cols, scratch);
  for (int64_t j = 0; j < grid.cols; ++j) std::memset(keep + j * grid.width, scratch[j], grid.width);
}

}  // namespace sparsebert
