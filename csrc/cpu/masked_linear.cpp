#include <torch/csrc/stable/library.h>

#include "gemm.h"
#include "split_weight_grad.h"

namespace sparsebert {
namespace {

std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = last;
  return sizes;
}

void check(const Tensor& x, const Tensor& masked_weight) {
  STD_TORCH_CHECK(masked_weight.dim() == 2, "masked_weight: expected [N, K]");
  STD_TORCH_CHECK(x.dim() >= 1 && x.scalar_type() == masked_weight.scalar_type(), "x: expected masked_weight's dtype");
}

Tensor masked_linear(
    Tensor x, Tensor weight, Tensor masked_weight, std::optional<Tensor> scores, std::optional<Tensor> bits,
    std::optional<Tensor> bias, std::vector<int64_t> cells) {
  check(x, masked_weight);
  const int64_t n = masked_weight.size(0), k = masked_weight.size(1);
  STD_TORCH_CHECK(x.size(x.dim() - 1) == k, "x: expected [..., ", k, "]");
  STD_TORCH_CHECK(!bias || (bias->numel() == n && bias->scalar_type() == x.scalar_type()), "bias: expected [", n, "]");
  const int64_t m = k > 0 ? x.numel() / k : 0;
  STD_TORCH_CHECK(k > 0, "masked_weight: expected at least one column");
  const Tensor y = matmul_t(torch::stable::reshape(x, {m, k}), masked_weight, bias);
  return x.dim() == 2 ? y : torch::stable::reshape(y, with_last(x, n));
}

std::tuple<Tensor, Tensor, Tensor> masked_linear_backward(
    Tensor grad, Tensor x, Tensor weight, Tensor masked_weight, std::optional<Tensor> bits,
    std::vector<int64_t> cells, bool need_x, bool need_scores, bool need_weight) {
  check(x, masked_weight);
  const int64_t n = masked_weight.size(0), k = masked_weight.size(1);
  STD_TORCH_CHECK(n > 0 && k > 0, "masked_weight: expected at least one row and column");
  STD_TORCH_CHECK(grad.numel() / n == x.numel() / k, "grad: expected as many rows as x");
  const int64_t m = x.numel() / k;
  const Tensor dy = torch::stable::reshape(grad, {m, n});
  Tensor dx = empty({0}, x.scalar_type());
  if (need_x) {
    dx = torch::stable::reshape(matmul_t(dy, torch::stable::transpose(masked_weight, 0, 1), std::nullopt), x.sizes());
  }
  if (!need_scores && !need_weight) return {dx, empty({0}, ScalarType::Float), empty({0}, weight.scalar_type())};
  const Tensor rows = torch::stable::reshape(x, {m, k});
  const Tensor product = matmul_t(torch::stable::transpose(dy, 0, 1), torch::stable::transpose(rows, 0, 1), std::nullopt);
  auto [score_grad, weight_grad] = split_weight_grad(product, weight, bits, cells, need_scores, need_weight, true);
  return {dx, score_grad, weight_grad};
}

}  // namespace
}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CPU, m) {
  m.impl("masked_linear", TORCH_BOX(&sparsebert::masked_linear));
  m.impl("masked_linear_backward", TORCH_BOX(&sparsebert::masked_linear_backward));
}
