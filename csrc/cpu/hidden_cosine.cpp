// Mean cosine distance of mapped layers' hidden states, and its gradient, in one pass over memory.

#include <torch/csrc/stable/library.h>

#include "hidden.h"

namespace sparsebert {
namespace {

#define SB_FILE "hidden_cosine.inc"
#include "each_isa.inc"

std::tuple<Tensor, std::vector<Tensor>> hidden_cosine(
    std::vector<Tensor> student, std::vector<Tensor> teacher, std::optional<Tensor> token_mask, bool need_grad) {
  const HiddenLayers all = hidden_layers(student, teacher, token_mask, need_grad);
  const Isa isa = active_isa();
  const auto run = isa >= Isa::avx512 ? &avx512::run : isa == Isa::avx2 ? &avx2::run : &generic::run;
  const double factor = 1 / all.kept;
  const double total = sum_over_tokens(all, [&](const char* s, const char* t, char* grad, int64_t rows) {
    return run(all.student_dtype, all.teacher_dtype, s, t, grad, rows, all.width, factor);
  });
  return {scalar(total / all.kept), all.grad};
}

}  // namespace
}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CPU, m) {
  m.impl("hidden_cosine", TORCH_BOX(&sparsebert::hidden_cosine));
}
