// Attention of one head in bf16 with AVX512_BF16: products of pairs added up in fp32, softmax in fp32, probabilities
// rounded to bf16 for the second product. Laid out as varlen_attention.inc is, in pairs along the depth instead of floats.

#include <immintrin.h>

#include "isa.h"
#include "varlen_attention.h"

namespace sparsebert::attention {
namespace {

#define SB_TARGET SB_TARGET_AVX512_BF16
#define SB_INLINE SB_TARGET static inline __attribute__((always_inline, unused))
#include "transpose16.inc"

constexpr int64_t kPanel = 64;

// C[R, V vectors] = A[R, 2 pairs] B[pairs, V vectors of pairs]; lda counts bf16s.
template <int R, int V>
SB_TARGET static void product(
    const uint16_t* a, int64_t lda, const uint32_t* b, int64_t pairs, float* c, int64_t ldc) {
  __m512 sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < pairs; ++k) {
    __m512i column[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) column[v] = _mm512_loadu_si512(b + (k * V + v) * 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, a + r * lda + 2 * k, 4);
      const __m512i x = _mm512_set1_epi32(pair);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)column[v], (__m512bh)x);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(c + r * ldc + v * 16, sum[r][v]);
  }
}

typedef void (*Product)(const uint16_t*, int64_t, const uint32_t*, int64_t, float*, int64_t);

#define SB_OF(R) {product<R, 1>, product<R, 2>, product<R, 3>, product<R, 4>}
const Product kProducts[kRows][4] = {SB_OF(1), SB_OF(2), SB_OF(3), SB_OF(4), SB_OF(5), SB_OF(6)};
#undef SB_OF

SB_INLINE int64_t panel_vectors(int64_t columns) {
  if (columns >= 2 * kPanel) return 4;
  const int64_t vectors = (columns + 15) / 16;
  return vectors > 4 ? (vectors + 1) / 2 : vectors;
}
SB_INLINE __mmask16 first16(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1); }
SB_INLINE __mmask32 first32(int64_t n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1; }

// Rows 2 j and 2 j + 1 interleaved, [ceil(length / 2), V vectors] a panel; zeros past the last row and column.
SB_TARGET static void pack_values(const uint16_t* rows, int64_t stride, int64_t length, int64_t dim, uint32_t* to) {
  const int64_t pairs = (length + 1) / 2;
  alignas(64) uint16_t order[2][32];
  for (int i = 0; i < 16; ++i) {
    for (int half = 0; half < 2; ++half) {
      order[half][2 * i] = static_cast<uint16_t>(16 * half + i);
      order[half][2 * i + 1] = static_cast<uint16_t>(32 + 16 * half + i);
    }
  }
  const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
  for (int64_t first = 0, vectors; first < dim; first += vectors * 16) {
    vectors = panel_vectors(dim - first);
    uint32_t* panel = to + first * pairs;
    for (int64_t j = 0; j < pairs; ++j) {
      const uint16_t* even = rows + 2 * j * stride + first;
      for (int64_t v = 0; v < vectors; v += 2) {
        const int64_t wanted = vectors - v > 1 ? 32 : 16, left = dim - first - 16 * v;
        const __mmask32 mask = first32(left < wanted ? left : wanted);
        const __m512i a = _mm512_maskz_loadu_epi16(mask, even + 16 * v);
        const __m512i b = _mm512_maskz_loadu_epi16(2 * j + 1 < length ? mask : 0, even + stride + 16 * v);
        _mm512_storeu_si512(panel + (j * vectors + v) * 16, _mm512_permutex2var_epi16(a, low, b));
        if (v + 1 < vectors) {
          _mm512_storeu_si512(panel + (j * vectors + v + 1) * 16, _mm512_permutex2var_epi16(a, high, b));
        }
      }
    }
  }
}

SB_TARGET void pack(const Call& call, const Piece& piece, const Buffers& to) {
  const auto* k = static_cast<const uint16_t*>(call.k) + piece.token * call.k_row + piece.head * call.k_head;
  const auto* v = static_cast<const uint16_t*>(call.v) + piece.token * call.v_row + piece.head * call.v_head;
  const int64_t length = piece.length, dim = call.dim, pairs = (dim + 1) / 2;
  for (int64_t first = 0, width; first < length; first += width) {
    width = panel_vectors(length - first) * 16;
    uint32_t* panel = static_cast<uint32_t*>(to.keys) + first * pairs;
    for (int64_t group = 0; group < width; group += 16) {
      const int64_t count = length - first - group;
      transpose16<Pairs>(
          k + (first + group) * call.k_row, call.k_row, count < 16 ? count : 16, dim, panel + group, width);
    }
  }
  pack_values(v, call.v_row, length, dim, static_cast<uint32_t*>(to.values));
}

// 2^x for x <= 0, to 3e-6: the result is rounded to bf16. Of the integer part only the exponent is touched.
SB_INLINE __m512 power_of_two(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, 0x09);  // x - floor(x), in [0, 1)
  __m512 p = _mm512_set1_ps(0.013534168f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.052011464f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.24144275f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.69300383f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0000026f));
  return _mm512_scalef_ps(p, x);
}

// A score times the factor, rounded as it was where the largest was sought. Contracted with the subtraction that follows
// it would leave the rounding of a very large score, and not 0, between the largest and itself.
SB_INLINE __m512 scaled(const float* scores, __m512 factor) {
  __m512 product = _mm512_mul_ps(_mm512_loadu_ps(scores), factor);
  __asm__("" : "+v"(product));
  return product;
}

// One row's scores to probabilities in bf16, in their place, short of the division by their sum; returns one over that.
// Zeros up to a multiple of 32.
SB_INLINE float exponentials(float* scores, int64_t length, __m512 factor) {
  const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
  __m512 most = lowest;
  int64_t j = 0;
  for (; j + 16 <= length; j += 16) most = _mm512_max_ps(_mm512_mul_ps(_mm512_loadu_ps(scores + j), factor), most);
  if (j < length) {
    most = _mm512_max_ps(_mm512_mask_mul_ps(lowest, first16(length - j), _mm512_loadu_ps(scores + j), factor), most);
  }
  const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  __m512 total = _mm512_setzero_ps();
  auto* probabilities = reinterpret_cast<uint16_t*>(scores);
  for (j = 0; j + 32 <= length; j += 32) {
    const __m512 a = power_of_two(_mm512_sub_ps(scaled(scores + j, factor), largest));
    const __m512 b = power_of_two(_mm512_sub_ps(scaled(scores + j + 16, factor), largest));
    total = _mm512_add_ps(total, _mm512_add_ps(a, b));
    _mm512_storeu_si512(probabilities + j, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
  if (j < length) {
    const int64_t left = length - j;
    const __m512 x = _mm512_sub_ps(scaled(scores + j, factor), largest);
    const __m512 y = _mm512_sub_ps(scaled(scores + j + 16, factor), largest);
    const __m512 a = _mm512_maskz_mov_ps(first16(left), power_of_two(x));
    const __m512 b = _mm512_maskz_mov_ps(left > 16 ? first16(left - 16) : 0, power_of_two(y));
    total = _mm512_add_ps(total, _mm512_add_ps(a, b));
    _mm512_storeu_si512(probabilities + j, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
  return 1.0f / _mm512_reduce_add_ps(total);
}

// One row of a panel of the result, times `share`, to bf16.
SB_INLINE void put_row(uint16_t* to, const float* row, int64_t columns, float share) {
  const __m512 factor = _mm512_set1_ps(share);
  for (int64_t c = 0; c < columns; c += 32) {
    const __m512 a = _mm512_mul_ps(_mm512_loadu_ps(row + c), factor);
    const __m512 b = _mm512_mul_ps(_mm512_loadu_ps(row + c + 16), factor);
    _mm512_mask_storeu_epi16(to + c, first32(columns - c), (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
}

SB_TARGET void attend(const Call& call, const Piece& piece, const Buffers& with) {
  const int64_t length = piece.length, dim = call.dim, stride = padded(length);
  const int64_t dim_pairs = (dim + 1) / 2, pairs = (length + 1) / 2;
  const auto* keys = static_cast<const uint32_t*>(with.keys);
  const auto* values = static_cast<const uint32_t*>(with.values);
  const __m512 factor = _mm512_set1_ps(call.scale * 1.44269504088896f);
  for (int64_t done = 0; done < piece.rows; done += kRows) {
    const int64_t rows = piece.rows - done < kRows ? piece.rows - done : kRows;
    const int64_t token = piece.token + piece.first + done;
    const uint16_t* q = static_cast<const uint16_t*>(call.q) + token * call.q_row + piece.head * call.q_head;
    int64_t q_row = call.q_row;
    if (dim % 2 != 0) {
      auto* copy = static_cast<uint16_t*>(with.queries);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < dim; ++i) copy[r * 2 * dim_pairs + i] = q[r * q_row + i];
        copy[r * 2 * dim_pairs + dim] = 0;
      }
      q = copy;
      q_row = 2 * dim_pairs;
    }
    const Product* products = kProducts[rows - 1];
    for (int64_t j = 0, vectors; j < length; j += vectors * 16) {
      vectors = panel_vectors(length - j);
      products[vectors - 1](q, q_row, keys + j * dim_pairs, dim_pairs, with.scores + j, stride);
    }
    float share[kRows];
    for (int64_t r = 0; r < rows; ++r) share[r] = exponentials(with.scores + r * stride, length, factor);
    const auto* probabilities = reinterpret_cast<const uint16_t*>(with.scores);
    for (int64_t i = 0, vectors; i < dim; i += vectors * 16) {
      vectors = panel_vectors(dim - i);
      products[vectors - 1](probabilities, 2 * stride, values + i * pairs, pairs, with.tile, kPanel);
      const int64_t columns = dim - i < vectors * 16 ? dim - i : vectors * 16;
      for (int64_t r = 0; r < rows; ++r) {
        auto* out = static_cast<uint16_t*>(call.out) + (token + r) * call.out_row + piece.head * dim + i;
        put_row(out, with.tile + r * kPanel, columns, share[r]);
      }
    }
  }
}

}  // namespace

extern const Kernels bf16_kernels;
const Kernels bf16_kernels = {&pack, &attend};

}  // namespace sparsebert::attention
