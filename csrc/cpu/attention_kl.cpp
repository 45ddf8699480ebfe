// KL divergence of a student's attention maps from a teacher's, and its gradients to q and k.

#include <torch/csrc/stable/library.h>

#include "attention_map.h"

namespace sparsebert {
namespace {

std::tuple<Tensor, Tensor, Tensor> attention_kl(
    Tensor student_q, Tensor student_k, Tensor teacher_q, Tensor teacher_k, std::optional<Tensor> token_mask,
    double student_scale, double teacher_scale, bool need_grad) {
  return attention_map_loss(
      student_q, student_k, teacher_q, teacher_k, token_mask, student_scale, teacher_scale, MapLoss::kl, false,
      need_grad);
}

}  // namespace
}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CPU, m) {
  m.impl("attention_kl", TORCH_BOX(&sparsebert::attention_kl));
}
