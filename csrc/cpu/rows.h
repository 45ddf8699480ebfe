// Row-wise loops over weights in fp32, bf16 and fp16: select under a mask, multiply, accumulate. Written as plain loops
// that the compiler vectorises, and compiled once per instruction set (rows.inc).

#pragma once

#include <cstdint>

#include "../grid.h"
#include "isa.h"

namespace sparsebert {

enum class Dtype { f32, bf16, f16 };

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

struct RowKernels {
  // out[i] = keep[i] ? in[i] : 0, converted; keep is 0 or 1. in and out may be the same memory if the dtypes are.
  void (*select)(Dtype in_dtype, const void* in, const uint8_t* keep, Dtype out_dtype, void* out, int64_t n);
  // out[i] = product[i] * weight[i]; out may be product itself where that is fp32.
  void (*multiply)(Dtype p_dtype, const void* product, Dtype w_dtype, const void* weight, float* out, int64_t n);
  // sum[i] += product[i] * weight[i]
  void (*accumulate)(Dtype p_dtype, const void* product, Dtype w_dtype, const void* weight, float* sum, int64_t n);
};

const RowKernels& row_kernels(Isa isa);

// keep[0..n) = the n bits from bit `first` on, one byte each (0 or 1). `keep` has room for n rounded up to 8.
void expand_bits(const uint8_t* bits, int64_t first, int64_t n, uint8_t* keep);

// The mask of one matrix row as bytes: grid row `grid_row`, each bit repeated over its block's width.
// `scratch` and `keep` have room for the matrix's columns rounded up to 8.
void expand_row(const uint8_t* bits, const Grid& grid, int64_t grid_row, uint8_t* scratch, uint8_t* keep);

}  // namespace sparsebert
