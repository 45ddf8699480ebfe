#pragma once

#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace sparsebert {

struct SoftRows {
  Dtype student_dtype, teacher_dtype;
  const void* student;  // [rows, classes]
  const void* teacher;  // likewise
  const uint8_t* keep;  // [rows] of 0 and 1, or null
  void* grad;           // like student, or null
  int64_t rows, classes;
  float inverse_temperature;
  float grad_scale;  // the gradient is this times the difference of the two probabilities
};

struct SoftKernels {
  // Rows are taken this many at a time: 1 where there are enough classes to fill vectors.
  int64_t (*step)(int64_t classes);
  // The sum over rows [first, last) of -sum p_teacher log p_student; `scratch` has `floats(classes)` of them.
  double (*run)(const SoftRows& rows, int64_t first, int64_t last, float* scratch);
  int64_t (*floats)(int64_t classes);
};

const SoftKernels& soft_kernels(Isa isa);

}  // namespace sparsebert
