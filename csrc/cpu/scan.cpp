#include "scan.h"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace sparsebert {
namespace {

// ---- plain C++, also the tails of the others ------------------------------------------------------------------------

void count_one(float x, float low, float high, float* buffer, int64_t capacity, BracketCount& count) {
  if (x < low) ++count.less;
  else if (x == low) ++count.at_low;
  else if (x == high) ++count.at_high;
  else if (x > low && x < high) {
    if (count.interior < capacity) buffer[count.interior] = x;
    ++count.interior;
  } else if (x != x) count.nan = true;
}

BracketCount count_bracket_generic(
    const float* x, int64_t n, float low, float high, float* buffer, int64_t capacity) {
  BracketCount count;
  for (int64_t i = 0; i < n; ++i) count_one(x[i], low, high, buffer, capacity, count);
  return count;
}

int64_t count_equal_generic(const float* x, int64_t n, float value) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += x[i] == value;
  return count;
}

bool pack_above_generic(const float* x, int64_t n, float value, bool or_equal, uint8_t* bits) {
  bool nan = false;
  for (int64_t i = 0; i < n; i += 8) {
    uint8_t byte = 0;
    const int64_t count = std::min<int64_t>(8, n - i);
    for (int64_t j = 0; j < count; ++j) {
      const float v = x[i + j];
      byte |= static_cast<uint8_t>(or_equal ? v >= value : v > value) << j;
      nan |= v != v;
    }
    bits[i >> 3] = byte;
  }
  return nan;
}

bool pack_groups_generic(const float* x, int64_t groups, int keep, int m, float floor, uint8_t* bits) {
  bool nan = false;
  std::memset(bits, 0, (groups * m + 7) / 8);
  for (int64_t g = 0; g < groups; ++g) {
    const float* group = x + g * m;
    for (int i = 0; i < m; ++i) {
      int better = 0;
      for (int j = 0; j < i; ++j) better += group[j] > group[i];
      for (int j = i + 1; j < m; ++j) better += group[j] >= group[i];
      nan |= group[i] != group[i];
      const int64_t at = g * m + i;
      bits[at >> 3] |= static_cast<uint8_t>(better < keep || group[i] > floor) << (at & 7);
    }
  }
  return nan;
}

// ---- AVX2 -----------------------------------------------------------------------------------------------------------

SB_TARGET_AVX2 BracketCount count_bracket_avx2(
    const float* x, int64_t n, float low, float high, float* buffer, int64_t capacity) {
  BracketCount count;
  const __m256 lo = _mm256_set1_ps(low), hi = _mm256_set1_ps(high);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 v = _mm256_loadu_ps(x + i);
    const int less = _mm256_movemask_ps(_mm256_cmp_ps(v, lo, _CMP_LT_OQ));
    const int above = _mm256_movemask_ps(_mm256_cmp_ps(v, hi, _CMP_GT_OQ));
    count.less += _mm_popcnt_u32(less);
    int rest = ~(less | above) & 0xff;
    // Few lanes are left where the bracket is narrow: NaNs, the bracket's ends and its interior.
    for (; rest != 0; rest &= rest - 1) count_one(x[i + __builtin_ctz(rest)], low, high, buffer, capacity, count);
  }
  for (; i < n; ++i) count_one(x[i], low, high, buffer, capacity, count);
  return count;
}

SB_TARGET_AVX2 int64_t count_equal_avx2(const float* x, int64_t n, float value) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += x[i] == value;
  return count;
}

SB_TARGET_AVX2 bool pack_above_avx2(const float* x, int64_t n, float value, bool or_equal, uint8_t* bits) {
  const __m256 t = _mm256_set1_ps(value);
  __m256 unordered = _mm256_setzero_ps();
  const int64_t whole = n & ~int64_t{7};
  for (int64_t i = 0; i < whole; i += 8) {
    const __m256 v = _mm256_loadu_ps(x + i);
    const __m256 above = or_equal ? _mm256_cmp_ps(v, t, _CMP_GE_OQ) : _mm256_cmp_ps(v, t, _CMP_GT_OQ);
    unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    bits[i >> 3] = static_cast<uint8_t>(_mm256_movemask_ps(above));
  }
  const bool tail_nan = whole < n && pack_above_generic(x + whole, n - whole, value, or_equal, bits + (whole >> 3));
  return _mm256_movemask_ps(unordered) != 0 || tail_nan;
}

template <int M>
SB_TARGET_AVX2 bool pack_groups_fixed_avx2(const float* x, int64_t groups, int keep, float floor, uint8_t* bits) {
  __m256i partner[M];
  __m256 later[M];
  for (int r = 1; r < M; ++r) {
    alignas(32) int32_t index[8], is_later[8];
    for (int lane = 0; lane < 8; ++lane) {
      index[lane] = lane - lane % M + (lane + r) % M;
      is_later[lane] = lane % M + r < M ? -1 : 0;
    }
    partner[r] = _mm256_load_si256(reinterpret_cast<const __m256i*>(index));
    later[r] = _mm256_castsi256_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(is_later)));
  }
  const __m256i wanted = _mm256_set1_epi32(keep);
  const __m256 above = _mm256_set1_ps(floor);
  __m256 unordered = _mm256_setzero_ps();
  const int64_t n = groups * M, whole = n & ~int64_t{7};
  for (int64_t i = 0; i < whole; i += 8) {
    const __m256 v = _mm256_loadu_ps(x + i);
    __m256i better = _mm256_setzero_si256();
    for (int r = 1; r < M; ++r) {
      const __m256 other = _mm256_permutevar8x32_ps(v, partner[r]);
      const __m256 greater = _mm256_cmp_ps(other, v, _CMP_GT_OQ);
      const __m256 equal = _mm256_and_ps(_mm256_cmp_ps(other, v, _CMP_EQ_OQ), later[r]);
      better = _mm256_sub_epi32(better, _mm256_castps_si256(_mm256_or_ps(greater, equal)));
    }
    const __m256 ranked = _mm256_castsi256_ps(_mm256_cmpgt_epi32(wanted, better));
    const __m256 kept = _mm256_or_ps(ranked, _mm256_cmp_ps(v, above, _CMP_GT_OQ));
    unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    bits[i >> 3] = static_cast<uint8_t>(_mm256_movemask_ps(kept));
  }
  bool nan = _mm256_movemask_ps(unordered) != 0;
  if (whole < n) nan |= pack_groups_generic(x + whole, (n - whole) / M, keep, M, floor, bits + (whole >> 3));
  return nan;
}

bool pack_groups_avx2(const float* x, int64_t groups, int keep, int m, float floor, uint8_t* bits) {
  switch (m) {
    case 2: return pack_groups_fixed_avx2<2>(x, groups, keep, floor, bits);
    case 4: return pack_groups_fixed_avx2<4>(x, groups, keep, floor, bits);
    case 8: return pack_groups_fixed_avx2<8>(x, groups, keep, floor, bits);
    default: return pack_groups_generic(x, groups, keep, m, floor, bits);
  }
}

// ---- AVX-512 --------------------------------------------------------------------------------------------------------

SB_TARGET_AVX512 BracketCount count_bracket_avx512(
    const float* x, int64_t n, float low, float high, float* buffer, int64_t capacity) {
  BracketCount count;
  const __m512 lo = _mm512_set1_ps(low), hi = _mm512_set1_ps(high);
  const int64_t whole = n & ~int64_t{15};
  for (int64_t i = 0; i < whole; i += 16) {
    const __m512 v = _mm512_loadu_ps(x + i);
    const __mmask16 less = _mm512_cmp_ps_mask(v, lo, _CMP_LT_OQ);
    const __mmask16 above = _mm512_cmp_ps_mask(v, hi, _CMP_GT_OQ);
    const __mmask16 inside = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(v, lo, _CMP_GT_OQ), v, hi, _CMP_LT_OQ);
    count.less += _mm_popcnt_u32(less);
    // Stored whether or not there is any: a branch here would be taken every other time, at random. The compress is in
    // registers because compressing into memory is microcoded on some CPUs.
    if (count.interior < capacity) _mm512_storeu_ps(buffer + count.interior, _mm512_maskz_compress_ps(inside, v));
    count.interior += _mm_popcnt_u32(inside);
    __mmask16 rest = ~(less | above | inside);
    // The bracket's ends and NaNs, both rare unless scores repeat.
    if (rest == 0) continue;
    const __mmask16 at_low = _mm512_mask_cmp_ps_mask(rest, v, lo, _CMP_EQ_OQ);
    const __mmask16 unordered = _mm512_mask_cmp_ps_mask(rest, v, v, _CMP_UNORD_Q);
    count.at_low += _mm_popcnt_u32(at_low);
    count.at_high += _mm_popcnt_u32(rest & ~(at_low | unordered));
    count.nan |= unordered != 0;
  }
  for (int64_t i = whole; i < n; ++i) count_one(x[i], low, high, buffer, capacity, count);
  return count;
}

SB_TARGET_AVX512 int64_t count_equal_avx512(const float* x, int64_t n, float value) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += x[i] == value;
  return count;
}

SB_TARGET_AVX512 bool pack_above_avx512(const float* x, int64_t n, float value, bool or_equal, uint8_t* bits) {
  const __m512 t = _mm512_set1_ps(value);
  __mmask16 unordered = 0;
  const int64_t whole = n & ~int64_t{15};
  for (int64_t i = 0; i < whole; i += 16) {
    const __m512 v = _mm512_loadu_ps(x + i);
    const __mmask16 above = or_equal ? _mm512_cmp_ps_mask(v, t, _CMP_GE_OQ) : _mm512_cmp_ps_mask(v, t, _CMP_GT_OQ);
    unordered |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    std::memcpy(bits + (i >> 3), &above, 2);
  }
  const bool tail_nan = whole < n && pack_above_generic(x + whole, n - whole, value, or_equal, bits + (whole >> 3));
  return unordered != 0 || tail_nan;
}

template <int M>
SB_TARGET_AVX512 bool pack_groups_fixed_avx512(const float* x, int64_t groups, int keep, float floor, uint8_t* bits) {
  __m512i partner[M];
  __mmask16 later[M];
  for (int r = 1; r < M; ++r) {
    alignas(64) int32_t index[16];
    later[r] = 0;
    for (int lane = 0; lane < 16; ++lane) {
      index[lane] = lane - lane % M + (lane + r) % M;
      if (lane % M + r < M) later[r] |= static_cast<__mmask16>(1u << lane);
    }
    partner[r] = _mm512_load_si512(index);
  }
  const __m512i wanted = _mm512_set1_epi32(keep), one = _mm512_set1_epi32(1);
  const __m512 above = _mm512_set1_ps(floor);
  __mmask16 unordered = 0;
  const int64_t n = groups * M, whole = n & ~int64_t{15};
  for (int64_t i = 0; i < whole; i += 16) {
    const __m512 v = _mm512_loadu_ps(x + i);
    __m512i better = _mm512_setzero_si512();
    for (int r = 1; r < M; ++r) {
      const __m512 other = _mm512_permutexvar_ps(partner[r], v);
      const __mmask16 ahead = _mm512_cmp_ps_mask(other, v, _CMP_GT_OQ) |
                              _mm512_mask_cmp_ps_mask(later[r], other, v, _CMP_EQ_OQ);
      better = _mm512_mask_add_epi32(better, ahead, better, one);
    }
    const __mmask16 kept = _mm512_cmplt_epi32_mask(better, wanted) | _mm512_cmp_ps_mask(v, above, _CMP_GT_OQ);
    unordered |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    std::memcpy(bits + (i >> 3), &kept, 2);
  }
  bool nan = unordered != 0;
  if (whole < n) nan |= pack_groups_generic(x + whole, (n - whole) / M, keep, M, floor, bits + (whole >> 3));
  return nan;
}

bool pack_groups_avx512(const float* x, int64_t groups, int keep, int m, float floor, uint8_t* bits) {
  switch (m) {
    case 2: return pack_groups_fixed_avx512<2>(x, groups, keep, floor, bits);
    case 4: return pack_groups_fixed_avx512<4>(x, groups, keep, floor, bits);
    case 8: return pack_groups_fixed_avx512<8>(x, groups, keep, floor, bits);
    case 16: return pack_groups_fixed_avx512<16>(x, groups, keep, floor, bits);
    default: return pack_groups_generic(x, groups, keep, m, floor, bits);
  }
}

const ScanKernels kGeneric = {count_bracket_generic, count_equal_generic, pack_above_generic, pack_groups_generic};
const ScanKernels kAvx2 = {count_bracket_avx2, count_equal_avx2, pack_above_avx2, pack_groups_avx2};
const ScanKernels kAvx512 = {count_bracket_avx512, count_equal_avx512, pack_above_avx512, pack_groups_avx512};

}  // namespace

const ScanKernels& scan_kernels(Isa isa) {
  if (isa == Isa::avx512) return kAvx512;
  if (isa == Isa::avx2) return kAvx2;
  return kGeneric;
}

}  // namespace sparsebert
