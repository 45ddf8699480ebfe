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
bool prefers_onednn(const Tensor& a, const Tensor& b, bool activated) {
  // Next to a matrix-vector product memory is the bound and the leaner call wins, unless the weight is large: there two
  // threads of MKL take as long as one. sparsebert/nn/sparse_linear.py knows the same two numbers.
  constexpr int64_t kFew = 4, kLarge = 1 << 20;
  if ((a.size(0) < kFew && b.numel() < kLarge) || a.size(1) < kFew) return false;
  if (a.scalar_type() == ScalarType::BFloat16) return activated && has(Isa::avx512);
  return a.scalar_type() == ScalarType::Float && has(Isa::avx2) && std::strcmp(cpu().vendor, "AuthenticAMD") == 0;
}

Tensor onednn_linear(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias, Activation activation) {
  using torch::stable::detail::from;
  const char* const kinds[] = {"none", "gelu", "gelu", "relu", "tanh"};
  const std::string kind = kinds[static_cast<int>(activation)];
  // Unlike aten it takes a bias for contiguous without a look.
  const std::optional<Tensor> shift = bias ? std::optional<Tensor>(torch::stable::contiguous(*bias)) : std::nullopt;
  const std::string algorithm = activation == Activation::gelu_tanh ? "tanh" : "none";
  std::array<StableIValue, 6> stack{
      from(a), from(b), from(shift), from(kind), from(std::vector<int64_t>{}), from(std::optional<std::string>(algorithm))};
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

Tensor activated(const Tensor& y, Activation activation) {
  using torch::stable::detail::from;
  if (activation == Activation::none) return y;
  std::array<StableIValue, 2> stack{from(y), from(std::string(activation == Activation::gelu_tanh ? "tanh" : "none"))};
  const bool is_gelu = activation == Activation::gelu || activation == Activation::gelu_tanh;
  const char* const name = is_gelu ? "aten::gelu" : activation == Activation::relu ? "aten::relu" : "aten::tanh";
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace

Tensor matmul_t(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias, Activation activation) {
  if (prefers_onednn(a, b, activation != Activation::none)) return onednn_linear(a, b, bias, activation);
  return activated(aten_linear(a, b, bias), activation);
}

}  // namespace sparsebert
