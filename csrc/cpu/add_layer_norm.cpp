#include <immintrin.h>
#include <torch/csrc/stable/library.h>

#include "isa.h"
#include "tensors.h"

namespace sparsebert {
namespace {

#define SB_FILE "add_layer_norm.inc"
#include "each_isa.inc"

template <typename T>
struct Kernels {
  void (*rows)(const T*, const T*, const float*, const float*, T*, int64_t, int64_t, float, float*);
  void (*widen)(const T*, float*, int64_t);
};

template <typename T>
Kernels<T> kernels_for(Isa isa) {
  if (isa == Isa::avx512) return {avx512::rows<T>, avx512::widen<T>};
  if (isa == Isa::avx2) return {avx2::rows<T>, avx2::widen<T>};
  return {generic::rows<T>, generic::widen<T>};
}

template <typename T>
void run(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias, float eps, Tensor& out) {
  const int64_t width = weight.size(0), count = x.numel() / width;
  const Kernels<T> kernels = kernels_for<T>(active_isa());
  const T *a = const_data<T>(x), *b = const_data<T>(residual);
  T* to = data<T>(out);
  std::vector<float> scale(width), shift(width);
  kernels.widen(const_data<T>(weight), scale.data(), width);
  kernels.widen(const_data<T>(bias), shift.data(), width);
  // A row is far from worth a thread's wake-up; some 16 thousand numbers are.
  const int64_t grain = (int64_t{1} << 14) / width + 1;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(width);
    const int64_t at = begin * width;
    kernels.rows(a + at, b + at, scale.data(), shift.data(), to + at, end - begin, width, eps, scratch.data());
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
