// KL divergence of a student's self-relations from a teacher's, and its gradient: attention whose q and k are one.

#include <torch/csrc/stable/library.h>

#include "attention_map.h"

namespace sparsebert {
namespace {

std::tuple<Tensor, Tensor> relation_kl(
    Tensor student, Tensor teacher, std::optional<Tensor> token_mask, double student_scale, double teacher_scale,
    bool need_grad) {
  auto [loss, grad, none] = attention_map_loss(
      student, student, teacher, teacher, token_mask, student_scale, teacher_scale, MapLoss::kl, true, need_grad);
  return {loss, grad};
}

}  // namespace
}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CPU, m) {
  m.impl("relation_kl", TORCH_BOX(&sparsebert::relation_kl));
}
