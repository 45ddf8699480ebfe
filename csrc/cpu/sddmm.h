// What the sampled products dY^T X share: the gradient of a weight at its stored positions only.

#pragma once

#include "linear.h"

namespace sparsebert {

// dY [m, n] and X [m, k], of one dtype, row-major and contiguous.
struct Sampled {
  int64_t m, n, k;
  bool bf16;
  const void* grad;
  const void* x;
};

inline Sampled check_sampled(const Tensor& grad, const Tensor& x) {
  check_contiguous(grad, "grad");
  check_contiguous(x, "x");
  STD_TORCH_CHECK(grad.dim() == 2 && x.dim() == 2 && grad.size(0) == x.size(0),
                  "grad, x: expected [M, N] and [M, K]");
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "x: expected float32 or bfloat16");
  STD_TORCH_CHECK(grad.scalar_type() == dtype, "grad: expected x's dtype");
  return Sampled{x.size(0), grad.size(1), x.size(1), dtype == ScalarType::BFloat16, grad.const_data_ptr(),
                 x.const_data_ptr()};
}

}  // namespace sparsebert
