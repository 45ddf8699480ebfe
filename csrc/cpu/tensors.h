// What every CPU op checks of its tensors again, after Python: shapes, dtypes, memory.

#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "rows.h"

namespace sparsebert {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: break;
  }
  STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  return Dtype::f32;
}

inline void check_contiguous(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

// The most rows or columns of a weight: products of two such sizes, and of a few small numbers, stay within 64 bits.
constexpr int64_t kMostSize = int64_t{1} << 31;

inline void check_shape(int64_t n, int64_t k) {
  STD_TORCH_CHECK(n >= 0 && n <= kMostSize && k > 0 && k <= kMostSize,
                  "shape: expected [N, K] with K > 0 and both at most ", kMostSize, ", got [", n, ", ", k, "]");
}

inline void check_bits(const Tensor& bits, int64_t entries) {
  check_contiguous(bits, "bits");
  STD_TORCH_CHECK(
      bits.scalar_type() == ScalarType::Byte && bits.dim() == 1 && bits.size(0) == bytes_for(entries),
      "bits: expected uint8 [", bytes_for(entries), "], got ", bits.numel(), " entries");
}

inline Grid grid_on(const Tensor& weight, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected [N, K], got ", weight.dim(), " dimensions");
  const int64_t n = weight.size(0), k = weight.size(1);
  const bool divides = rows > 0 ? n % rows == 0 : (rows == 0 && n == 0);
  const bool divides_cols = cols > 0 ? k % cols == 0 : (cols == 0 && k == 0);
  STD_TORCH_CHECK(divides && divides_cols, "grid: [", rows, ", ", cols, "] does not divide [", n, ", ", k, "]");
  return Grid{rows, cols, rows > 0 ? n / rows : 1, cols > 0 ? k / cols : 1};
}

inline Grid grid_on(const Tensor& weight, const std::vector<int64_t>& cells) {
  STD_TORCH_CHECK(cells.size() == 2, "grid: expected two sizes, got ", cells.size());
  return grid_on(weight, cells[0], cells[1]);
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

inline Tensor empty(std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype);
}

// A large tensor not yet written, in huge pages where the system gives them: faulting in 4 KiB at a time costs several
// times what a loss or a sparse layer takes to compute. Only a hint: nothing depends on it.
inline Tensor empty_large(std::vector<int64_t> sizes, ScalarType dtype) {
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const Tensor out = empty(std::move(sizes), dtype);
  const auto bytes = static_cast<uintptr_t>(out.numel()) * (dtype == ScalarType::Float ? 4 : 2);
  const auto start = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
  const uintptr_t first = (start + kHuge - 1) / kHuge * kHuge, last = (start + bytes) / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  return out;
}

}  // namespace sparsebert
