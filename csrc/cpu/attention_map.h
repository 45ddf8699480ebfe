// Losses between the attention maps of a student and a teacher, without the maps: what attention_kl, attention_mse and
// relation_kl share. A head at a time, in blocks of queries whose scores stay in L2; the padding is left out while
// packing, so that nothing later knows of it.

#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "losses.h"

namespace sparsebert {

enum class MapLoss { kl, mse, score_mse };

// Rows of one head: token i begins at data + i * stride.
struct HeadRows {
  Dtype dtype;
  const char* data;
  int64_t stride;  // elements
};

struct Head {
  HeadRows student_q, student_k, teacher_q, teacher_k;
  int64_t student_width, teacher_width;
  float student_scale, teacher_scale;
  const int32_t* tokens;  // those that count
  int64_t count;
  MapLoss kind;
  char* grad_q;         // in the student's dtype, rows a grad_stride apart, or null. With grad_k null it gets the sum.
  char* grad_k;
  int64_t grad_stride;  // elements
  float weight;         // factor on the gradient
};

struct MapKernels {
  // The loss summed over the head's rows (kl) or pairs (mse); the gradients of the tokens that count are written.
  double (*head)(const Head& head, float* scratch);
  int64_t (*floats)(int64_t tokens, int64_t student_width, int64_t teacher_width);
};

// `bf16`: student and teacher both are.
const MapKernels& map_kernels(Isa isa, bool bf16);

// Loss and the gradients to q and k of the student ([0] where not needed): [batch, heads, seq, width] all, any strides
// but the last, which is 1. With `one`, q and k are the same tensor and the first gradient is the sum of both.
std::tuple<Tensor, Tensor, Tensor> attention_map_loss(
    const Tensor& student_q, const Tensor& student_k, const Tensor& teacher_q, const Tensor& teacher_k,
    const std::optional<Tensor>& token_mask, double student_scale, double teacher_scale, MapLoss kind, bool one,
    bool need_grad);

}  // namespace sparsebert
