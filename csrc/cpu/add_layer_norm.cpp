#include <torch/csrc/stable/library.h>

#include "isa.h"
#include "tensors.h"

namespace sparsebert {
namespace {

#define SB_FILE "add_layer_norm.inc"
#include "each_isa.inc"

template <typename T>
using Rows = void (*)(const T*, const T*, const T*, const T*, T*, int64_t, int64_t, float, float*);

template <typename T>
Rows<T> rows_for(Isa isa) {
  if (isa == Isa::avx512) return avx512::rows<T>;
  return isa == Isa::avx2 ? avx2::rows<T> : generic::rows<T>;
}

template <typename T>
void run(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias, float eps, Tensor& out) {
  const int64_t width = weight.size(0), count = x.numel() / width;
  const Rows<T> rows = rows_for<T>(active_isa());
  const T *a = const_data<T>(x), *b = const_data<T>(residual), *w = const_data<T>(weight), *c = const_data<T>(bias);
  T* to = data<T>(out);
  // A row is far from worth a thread's wake-up; some 16 thousand numbers are.
  const int64_t grain = (int64_t{1} << 14) / width + 1;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(width);
    const int64_t at = begin * width;
    rows(a + at, b + at, w, c, to + at, end - begin, width, eps, scratch.data());
  });
}

Tensor add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, double eps) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "x: expected float32 or bfloat16");
  for (const auto& [tensor, name] : {std::pair(&x, "x"), {&residual, "residual"}, {&weight, "weight"}, {&bias, "bias"}}) {
    check_contiguous(*tensor, name);
    STD_TORCH_CHECK(tensor->scalar_type() == dtype, name, ": expected x's dtype");
  }
  STD_TORCH_CHECK(weight.dim() == 1 && bias.dim() == 1 && weight.size(0) > 0, "weight, bias: expected [H]");
  const int64_t width = weight.size(0);
  STD_TORCH_CHECK(bias.size(0) == width, "bias: expected [", width, "] like weight");
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == width, "x: expected [..., ", width, "] to fit weight");
  STD_TORCH_CHECK(residual.dim() == x.dim(), "residual: expected x's shape");
  for (int64_t i = 0; i < x.dim(); ++i) STD_TORCH_CHECK(residual.size(i) == x.size(i), "residual: expected x's shape");
  Tensor out = empty(std::vector<int64_t>(x.sizes().begin(), x.sizes().end()), dtype);
  if (x.numel() == 0) return out;
  if (dtype == ScalarType::Float) run<float>(x, residual, weight, bias, static_cast<float>(eps), out);
  else run<uint16_t>(x, residual, weight, bias, static_cast<float>(eps), out);
  return out;
}

}  // namespace
}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CPU, m) {
  m.impl("add_layer_norm", TORCH_BOX(&sparsebert::add_layer_norm));
}
