#include "gemm.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>
#include <cstring>
#include <string>

#include "isa.h"

namespace sparsebert {
namespace {

// torch sends fp32 products to MKL, which on AMD reaches less than half of the machine where oneDNN (part of the same
// torch) reaches most of it; elsewhere MKL is the better one. bf16 products are oneDNN's in torch already.
bool prefers_onednn(const Tensor& a) {
  constexpr int64_t kFew = 4;  // next to a matrix-vector product memory is the bound; the leaner call wins
  if (a.size(0) < kFew || a.size(1) < kFew) return false;
  return a.scalar_type() == ScalarType::Float && has(Isa::avx2) && std::strcmp(cpu().vendor, "AuthenticAMD") == 0;
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
  // The `out` forms, which autocast leaves alone; with a bias the one that adds before it rounds.
  const Tensor out = empty({a.size(0), b.size(0)}, a.scalar_type());
  const Tensor columns = torch::stable::transpose(b, 0, 1);
  if (bias) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), bias->get(), a.get(), columns.get(), 1.0, 1.0));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), columns.get()));
  }
  return out;
}

}  // namespace

Tensor matmul_t(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias) {
  return prefers_onednn(a) ? onednn_linear(a, b, bias) : aten_linear(a, b, bias);
}

}  // namespace sparsebert
