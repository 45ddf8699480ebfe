// From P = dY^T X to what the mask's scores and the weight want of it.

#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace sparsebert {

// (dscores fp32 [GN, GK], dweight [N, K] in weight's dtype); [0] for one not needed. With `consume` the product's own
// memory may become one of the results.
std::tuple<Tensor, Tensor> split_weight_grad(
    const Tensor& product, const Tensor& weight, const std::optional<Tensor>& bits, const std::vector<int64_t>& cells,
    bool need_scores, bool need_weight, bool consume);

}  // namespace sparsebert
