// Dense products through torch's dispatcher.

#pragma once

#include <optional>

#include "tensors.h"

namespace sparsebert {

// a [M, K] times b [N, K] transposed, plus bias [N]: [M, N] in a's dtype, contiguous. Any strides; autocast does not
// reach it.
Tensor matmul_t(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias);

}  // namespace sparsebert
