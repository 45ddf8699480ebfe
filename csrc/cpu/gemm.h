// Dense products through torch's dispatcher.

#pragma once

#include <optional>

#include "tensors.h"

namespace sparsebert {

// In the order of vec.inc's Act.
enum class Activation { none, gelu, gelu_tanh, relu, tanh };

// a [M, K] times b [N, K] transposed, plus bias [N], activated: [M, N] in a's dtype, contiguous. Any strides; autocast
// does not reach it.
Tensor matmul_t(
    const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias, Activation activation = Activation::none);

}  // namespace sparsebert
