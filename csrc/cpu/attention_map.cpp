#include "attention_map.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <limits>

namespace sparsebert {
namespace {

#define SB_FILE "attention_map.inc"
#include "each_isa.inc"

namespace avx512 {
#include "attention_map_bf16.inc"
}  // namespace avx512

struct Side {
  const Tensor& q;
  const Tensor& k;
  int64_t width;
};

Side side_of(const Tensor& q, const Tensor& k, const Tensor& like, const char* name) {
  for (const auto* x : {&q, &k}) {
    STD_TORCH_CHECK(x->is_cpu() && x->dim() == 4, name, ": expected CPU tensors [batch, heads, seq, width]");
    for (int64_t i = 0; i < 3; ++i) {
      STD_TORCH_CHECK(x->size(i) == like.size(i), name, ": expected the student's batch, heads and sequence");
    }
    STD_TORCH_CHECK(x->size(3) == q.size(3) && q.size(3) > 0, name, ": expected q and k of one width");
    STD_TORCH_CHECK(x->stride(3) == 1 || x->size(3) == 1, name, ": expected a last dimension without gaps");
    loss_dtype(*x, name);
  }
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type(), name, ": expected q and k of one dtype");
  return {q, k, q.size(3)};
}

HeadRows rows_of(const Tensor& x, int64_t batch, int64_t head) {
  const Dtype dtype = loss_dtype(x, "q and k");
  const int64_t offset = batch * x.stride(0) + head * x.stride(1);
  return {dtype, static_cast<const char*>(x.const_data_ptr()) + offset * size_of(dtype), x.stride(2)};
}

// Each sequence's tokens that count.
std::vector<std::vector<int32_t>> kept_tokens(const uint8_t* keep, int64_t batch, int64_t seq) {
  std::vector<std::vector<int32_t>> tokens(batch);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < seq; ++i) {
      if (keep == nullptr || keep[b * seq + i]) tokens[b].push_back(static_cast<int32_t>(i));
    }
  }
  return tokens;
}

// [batch, seq, heads, width] in memory, as the layer before wants it.
Tensor grad_like(const Tensor& x, bool need) {
  if (!need) return empty({0}, x.scalar_type());
  return empty_large({x.size(0), x.size(2), x.size(1), x.size(3)}, x.scalar_type());
}

char* at(const Tensor& grad, int64_t batch, int64_t head) {
  const int64_t element = (batch * grad.size(1) * grad.size(2) + head) * grad.size(3);
  return static_cast<char*>(grad.mutable_data_ptr()) + element * size_of(dtype_of(grad, "gradient"));
}

void zero_padding(const uint8_t* keep, const Tensor& grad) {
  const int64_t row = grad.size(2) * grad.size(3) * size_of(dtype_of(grad, "gradient"));
  for (int64_t i = 0; i < grad.size(0) * grad.size(1); ++i) {
    if (!keep[i]) std::memset(static_cast<char*>(grad.mutable_data_ptr()) + i * row, 0, row);
  }
}

Tensor heads_first(const Tensor& grad, bool need) { return need ? torch::stable::transpose(grad, 1, 2) : grad; }

}  // namespace

const MapKernels& map_kernels(Isa isa, bool bf16) {
  if (bf16 && use_avx512_bf16()) return avx512::dot_kernels;
  if (isa >= Isa::avx512) return avx512::kernels;
  if (isa == Isa::avx2) return avx2::kernels;
  return generic::kernels;
}

std::tuple<Tensor, Tensor, Tensor> attention_map_loss(
    const Tensor& student_q, const Tensor& student_k, const Tensor& teacher_q, const Tensor& teacher_k,
    const std::optional<Tensor>& token_mask, double student_scale, double teacher_scale, MapLoss kind, bool one,
    bool need_grad) {
  STD_TORCH_CHECK(student_q.dim() == 4, "student: expected [batch, heads, seq, width]");
  const Side student = side_of(student_q, student_k, student_q, "student");
  const Side teacher = side_of(teacher_q, teacher_k, student_q, "teacher");
  const int64_t batch = student_q.size(0), heads = student_q.size(1), seq = student_q.size(2);
  STD_TORCH_CHECK(seq <= std::numeric_limits<int32_t>::max(), "student: the sequence is too long");
  const uint8_t* keep = mask_bytes(token_mask, "token_mask", batch * seq);
  const auto tokens = kept_tokens(keep, batch, seq);
  const bool bf16 = student_q.scalar_type() == ScalarType::BFloat16 && teacher_q.scalar_type() == ScalarType::BFloat16;
  const MapKernels& kernels = map_kernels(active_isa(), bf16);
  double pairs = 0;
  int64_t floats = 0;  // not always most for the longest sequence
  for (const auto& kept : tokens) {
    const auto n = static_cast<double>(kept.size());
    pairs += kind == MapLoss::kl ? n : n * n;
    floats = std::max(floats, kernels.floats(static_cast<int64_t>(kept.size()), student.width, teacher.width));
  }
  pairs = std::max(pairs * static_cast<double>(heads), 1.0);
  const Tensor grad_q = grad_like(student_q, need_grad), grad_k = grad_like(student_k, need_grad && !one);
  if (need_grad && keep != nullptr && heads > 0) {
    zero_padding(keep, grad_q);
    if (!one) zero_padding(keep, grad_k);
  }
  std::vector<double> partial(batch * heads, 0.0);
  torch::stable::parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(floats);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / heads, h = i % heads;
      if (tokens[b].empty()) continue;
      const Head head{rows_of(student_q, b, h),
                      rows_of(student_k, b, h),
                      rows_of(teacher_q, b, h),
                      rows_of(teacher_k, b, h),
                      student.width,
                      teacher.width,
                      static_cast<float>(student_scale),
                      static_cast<float>(teacher_scale),
                      tokens[b].data(),
                      static_cast<int64_t>(tokens[b].size()),
                      kind,
                      need_grad ? at(grad_q, b, h) : nullptr,
                      need_grad && !one ? at(grad_k, b, h) : nullptr,
                      heads * student.width,
                      static_cast<float>((kind == MapLoss::kl ? 1 : 2) / pairs)};
      partial[i] = kernels.head(head, scratch.get());
    }
  });
  double total = 0;
  for (const double part : partial) total += part;
  return {scalar(total / pairs), heads_first(grad_q, need_grad), heads_first(grad_k, need_grad && !one)};
}

}  // namespace sparsebert
