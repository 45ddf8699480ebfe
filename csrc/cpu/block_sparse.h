// A block-sparse weight [N, K] (BSR): blocks of height x width, row-major inside. What each array holds is told in
// sparsebert/ops/block_sparse_linear.py.

#pragma once

#include <cstdint>

#include "tensors.h"

namespace sparsebert {

struct BlockSparse {
  int64_t n, k;
  int64_t height, width;
  int64_t blocks;
  const void* values;
  const int32_t* columns;
  const int32_t* row_starts;

  int64_t block_rows() const { return n / height; }
  int64_t block_columns() const { return k / width; }
};

// Checks everything but the columns, which the kernels check as they meet them.
inline BlockSparse check_block_sparse(
    const Tensor& columns, const Tensor& row_starts, int64_t n, int64_t k, int64_t height, int64_t width) {
  check_shape(n, k);
  STD_TORCH_CHECK(height > 0 && width > 0 && n % height == 0 && k % width == 0,
                  "shape: [", n, ", ", k, "] is not made of blocks of ", height, " x ", width);
  check_contiguous(columns, "columns");
  check_contiguous(row_starts, "row_starts");
  STD_TORCH_CHECK(columns.scalar_type() == ScalarType::Int && columns.dim() == 1, "columns: expected int32 [B]");
  STD_TORCH_CHECK(
      row_starts.scalar_type() == ScalarType::Int && row_starts.dim() == 1 && row_starts.size(0) == n / height + 1,
      "row_starts: expected int32 [", n / height + 1, "]");
  const BlockSparse w{n, k, height, width, columns.numel(), nullptr, const_data<int32_t>(columns),
                      const_data<int32_t>(row_starts)};
  bool ascending = w.row_starts[0] == 0 && w.row_starts[w.block_rows()] == w.blocks;
  for (int64_t i = 0; i < w.block_rows(); ++i) ascending &= w.row_starts[i] <= w.row_starts[i + 1];
  STD_TORCH_CHECK(ascending, "row_starts: expected to rise from 0 to ", w.blocks);
  return w;
}

}  // namespace sparsebert
