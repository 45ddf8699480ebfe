#include "linear.h"

namespace sparsebert {

int activation_number(const std::string& activation) {
  const char* const words[] = {"none", "gelu", "gelu_tanh", "relu", "tanh"};
  for (int i = 0; i < 5; ++i) {
    if (activation == words[i]) return i;
  }
  STD_TORCH_CHECK(false, "activation: expected none, gelu, gelu_tanh, relu or tanh, got ", activation);
  return 0;
}

Linear make_linear(
    const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, int64_t n, int64_t k,
    const std::string& activation, Tensor& y) {
  check_contiguous(x, "x");
  check_contiguous(values, "values");
  check_shape(n, k);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k, "x: expected [..., ", k, "]");
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "x: expected float32 or bfloat16");
  STD_TORCH_CHECK(values.scalar_type() == dtype, "values: expected x's dtype");
  if (bias) {
    check_contiguous(*bias, "bias");
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n && bias->scalar_type() == dtype,
                    "bias: expected [", n, "] in x's dtype");
  }
  const int act = activation_number(activation);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  y = empty_large(sizes, dtype);
  return Linear{x.numel() / k, n, k, dtype == ScalarType::BFloat16, x.const_data_ptr(),
                bias ? bias->const_data_ptr() : nullptr, y.mutable_data_ptr(), act};
}

Tasks::Tasks(int64_t m, int64_t tile, int64_t parts, int64_t most, int64_t least)
    : m_(m), tile_(tile), tiles_((m + tile - 1) / tile), parts_(parts) {
  const int64_t threads = torch::stable::get_num_threads();
  int64_t groups = (parts + most - 1) / most;
  if (threads > 1) {
    // Enough tasks that the last round, which may be ragged, is a small part of the whole.
    const int64_t enough = tiles_ >= 4 * threads ? 1 : (4 * threads + tiles_ - 1) / std::max<int64_t>(tiles_, 1);
    const int64_t finest = std::max<int64_t>(parts / least, 1);
    const int64_t wanted = tiles_ % threads == 0 ? 1 : enough;
    groups = std::max(groups, std::min(finest, wanted));
  }
  groups_ = std::max<int64_t>(groups, 1);
  per_group_ = (parts + groups_ - 1) / groups_;
}

Task Tasks::at(int64_t i) const {
  const int64_t row = i / groups_ * tile_, part = i % groups_ * per_group_;
  return Task{row, std::min(tile_, m_ - row), part, std::max<int64_t>(std::min(per_group_, parts_ - part), 0)};
}

}  // namespace sparsebert
