#include "gemm.h"

#include <array>
#include <cstring>
#include <string>

#include "isa.h"

namespace sparsebert {
namespace {

// torch sends fp32 products to MKL, which on AMD reaches less than half of the machine where oneDNN (part of the same
// torch) reaches most of it; elsewhere MKL is the better one. bf16 products are oneDNN's in torch already, where AVX-512
// is; asking it directly spares the pass that adds the bias.
bool prefers_onednn(const Tensor& a, bool bias) {
  constexpr int64_t kFew = 4;  // next to a matrix-vector product memory is the bound; the leaner call wins
  if (a.size(0) < kFew || a.size(1) < kFew) return false;
  if (a.scalar_type() == ScalarType::Float) return has(Isa::avx2) && std::strcmp(cpu().vendor, "AuthenticAMD") == 0;
  return bias && a.scalar_type() == ScalarType::BFloat16 && has(Isa::avx512);
}

Tensor onednn_linear(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{
      from(a), from(b), from(bias), from(std::string("none")), from(std::vector<int64_t>{}), from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("mkldnn::_linear_pointwise", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor aten_linear(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  Tensor out = empty({a.size(0), b.size(0)}, a.scalar_type());
  // The `out` form, which autocast leaves alone.
  std::array<StableIValue, 3> stack{from(a), from(torch::stable::transpose(b, 0, 1)), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  const Tensor result = torch::stable::detail::to<Tensor>(stack[0]);
  if (!bias || result.numel() == 0) return result;
  check_contiguous(*bias, "bias");
  const RowKernels& kernels = row_kernels(active_isa());
  const int64_t cols = result.size(1);
  const Dtype bias_dtype = dtype_of(*bias, "bias"), dtype = dtype_of(result, "x");
  const void* addend = bias->const_data_ptr();
  char* first = static_cast<char*>(result.mutable_data_ptr());
  torch::stable::parallel_for(0, result.size(0), 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      kernels.add(bias_dtype, addend, dtype, first + row * cols * size_of(dtype), cols);
    }
  });
  return result;
}

}  // namespace

Tensor matmul_t(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias) {
  return prefers_onednn(a, bias.has_value()) ? onednn_linear(a, b, bias) : aten_linear(a, b, bias);
}

}  // namespace sparsebert
