// Hidden states of mapped layers, walked in tasks of whole tokens: what hidden_mse and hidden_cosine share.

#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "losses.h"

namespace sparsebert {

struct HiddenLayers {
  std::vector<Tensor> student, teacher, grad;  // grad is empty where none is needed
  Dtype student_dtype, teacher_dtype;
  const uint8_t* keep;  // [tokens] of 0 and 1, or null
  int64_t tokens;       // of a mask: rows of a layer are tokens, or a multiple of them for stacked layers
  int64_t rows, width;  // of one layer
  double kept;          // rows that count in all layers, at least 1
};

inline HiddenLayers hidden_layers(
    const std::vector<Tensor>& student, const std::vector<Tensor>& teacher, const std::optional<Tensor>& mask,
    bool need_grad) {
  STD_TORCH_CHECK(!student.empty() && student.size() == teacher.size(), "teacher: expected as many layers as student");
  HiddenLayers all;
  const int64_t dims = student[0].dim();
  STD_TORCH_CHECK(dims >= 1, "student: expected [..., width]");
  all.width = student[0].size(dims - 1);
  const int64_t numel = student[0].numel();
  all.rows = all.width > 0 ? numel / all.width : 0;
  for (size_t l = 0; l < student.size(); ++l) {
    for (const auto* side : {&student[l], &teacher[l]}) {
      check_contiguous(*side, "student and teacher");
      STD_TORCH_CHECK(
          side->dim() == dims && side->size(dims - 1) == all.width && side->numel() == numel,
          "student and teacher: expected one shape in all layers");
    }
    STD_TORCH_CHECK(
        student[l].scalar_type() == student[0].scalar_type() && teacher[l].scalar_type() == teacher[0].scalar_type(),
        "student and teacher: expected one dtype in all layers of each");
    if (need_grad) all.grad.push_back(empty_large(sizes_of(student[l]), student[l].scalar_type()));
  }
  all.student = student;
  all.teacher = teacher;
  all.student_dtype = loss_dtype(student[0], "student");
  all.teacher_dtype = loss_dtype(teacher[0], "teacher");
  all.tokens = mask ? mask->numel() : all.rows;
  all.keep = mask_bytes(mask, "token_mask", all.tokens);
  STD_TORCH_CHECK(
      all.rows == 0 || (all.tokens > 0 && all.rows % all.tokens == 0), "token_mask: does not fit student's tokens");
  const int64_t repeats = all.tokens > 0 ? all.rows / all.tokens : 0;
  const int64_t kept = count_kept(all.keep, all.tokens) * repeats * static_cast<int64_t>(student.size());
  all.kept = static_cast<double>(std::max<int64_t>(kept, 1));
  return all;
}

// Sums kernel(student, teacher, grad or null, rows) over runs of tokens that count, and zeroes the gradient of the
// others. Tasks, runs and the order of the sums depend on the shapes and the mask alone.
template <typename Kernel>
double sum_over_tokens(const HiddenLayers& all, const Kernel& kernel) {
  constexpr int64_t kTask = 1 << 15;  // elements
  if (all.rows == 0 || all.width == 0) return 0;
  const int64_t per_task = std::max<int64_t>(kTask / all.width, 1);
  const int64_t tasks = (all.rows + per_task - 1) / per_task, layers = static_cast<int64_t>(all.student.size());
  const int64_t s_row = all.width * size_of(all.student_dtype), t_row = all.width * size_of(all.teacher_dtype);
  std::vector<double> partial(layers * tasks, 0.0);
  torch::stable::parallel_for(0, layers * tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t layer = task / tasks, first = task % tasks * per_task;
      const int64_t last = std::min(first + per_task, all.rows);
      const char* s = static_cast<const char*>(all.student[layer].const_data_ptr());
      const char* t = static_cast<const char*>(all.teacher[layer].const_data_ptr());
      char* g = all.grad.empty() ? nullptr : static_cast<char*>(all.grad[layer].mutable_data_ptr());
      for (int64_t row = first; row < last;) {
        const bool kept = all.keep == nullptr || all.keep[row % all.tokens];
        int64_t stop = all.keep == nullptr ? last : row + 1;
        while (stop < last && (all.keep[stop % all.tokens] != 0) == kept) ++stop;
        char* grad = g == nullptr ? nullptr : g + row * s_row;
        if (kept) partial[task] += kernel(s + row * s_row, t + row * t_row, grad, stop - row);
        else if (grad != nullptr) std::memset(grad, 0, (stop - row) * s_row);
        row = stop;
      }
    }
  });
  double total = 0;
  for (const double part : partial) total += part;
  return total;
}

}  // namespace sparsebert
