// Soft cross entropy of two sets of logits and its gradient to the student's, in one pass over memory.

#include "soft_cross_entropy.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "losses.h"

namespace sparsebert {
namespace {

#define SB_FILE "soft_cross_entropy.inc"
#include "each_isa.inc"

constexpr int64_t kTask = 1 << 15;  // logits of a task: what is summed together depends on the shape alone

std::tuple<Tensor, Tensor> soft_cross_entropy(
    Tensor student, Tensor teacher, std::optional<Tensor> mask, double temperature, bool need_grad) {
  check_contiguous(student, "student_logits");
  check_contiguous(teacher, "teacher_logits");
  const int64_t dims = student.dim(), classes = dims > 0 ? student.size(dims - 1) : 0;
  STD_TORCH_CHECK(classes > 0, "student_logits: expected [..., C] with at least one class");
  STD_TORCH_CHECK(
      teacher.dim() == dims && teacher.size(dims - 1) == classes && teacher.numel() == student.numel(),
      "teacher_logits: expected the shape of student_logits");
  STD_TORCH_CHECK(temperature > 0, "temperature: expected a positive number");
  const int64_t count = student.numel() / classes;
  const uint8_t* keep = mask_bytes(mask, "mask", count);
  const double kept = static_cast<double>(std::max<int64_t>(count_kept(keep, count), 1));
  const Dtype dtype = loss_dtype(student, "student_logits");
  Tensor grad = need_grad ? empty_large(sizes_of(student), student.scalar_type()) : empty({0}, student.scalar_type());
  const SoftRows rows{dtype,
                      loss_dtype(teacher, "teacher_logits"),
                      student.const_data_ptr(),
                      teacher.const_data_ptr(),
                      keep,
                      need_grad ? grad.mutable_data_ptr() : nullptr,
                      count,
                      classes,
                      static_cast<float>(1.0 / temperature),
                      static_cast<float>(temperature / kept)};
  const SoftKernels& kernels = soft_kernels(active_isa());
  const int64_t step = kernels.step(classes), per_task = std::max<int64_t>(kTask / classes / step, 1) * step;
  const int64_t tasks = (count + per_task - 1) / per_task;
  std::vector<double> partial(tasks);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(kernels.floats(classes));
    for (int64_t task = begin; task < end; ++task) {
      partial[task] =
          kernels.run(rows, task * per_task, std::min((task + 1) * per_task, count), scratch.get());
    }
  });
  double total = 0;
  for (const double part : partial) total += part;
  return {scalar(total * temperature * temperature / kept), grad};
}

}  // namespace

const SoftKernels& soft_kernels(Isa isa) {
  if (isa >= Isa::avx512) return avx512::kernels;
  if (isa == Isa::avx2) return avx2::kernels;
  return generic::kernels;
}

}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CPU, m) {
  m.impl("soft_cross_entropy", TORCH_BOX(&sparsebert::soft_cross_entropy));
}
