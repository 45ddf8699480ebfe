// A dense weight: the faster of torch's two libraries, the activation in its epilogue where it has one.

#include <torch/csrc/stable/library.h>

#include "gemm.h"
#include "linear.h"

namespace sparsebert {
namespace {

Tensor dense_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, std::string activation) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected [N, K], got ", weight.dim(), " dimensions");
  const int64_t n = weight.size(0), k = weight.size(1);
  STD_TORCH_CHECK(x.is_cpu() && weight.is_cpu(), "x, weight: expected CPU tensors");
  STD_TORCH_CHECK(k > 0 && x.dim() >= 1 && x.size(x.dim() - 1) == k, "x: expected [..., ", k, "]");
  STD_TORCH_CHECK(x.scalar_type() == weight.scalar_type(), "weight: expected x's dtype");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == n && bias->scalar_type() == x.scalar_type()),
                  "bias: expected [", n, "] in x's dtype");
  const Activation act = static_cast<Activation>(activation_number(activation));
  const Tensor y = matmul_t(torch::stable::reshape(x, {x.numel() / k, k}), weight, bias, act);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  return x.dim() == 2 ? y : torch::stable::reshape(y, sizes);
}

}  // namespace
}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CPU, m) {
  m.impl("dense_linear", TORCH_BOX(&sparsebert::dense_linear));
}
