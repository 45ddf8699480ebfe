// What the CPU bodies of every linear op share: checks, the output, and how the work is cut into tasks.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "isa.h"
#include "scratch.h"
#include "tensors.h"

namespace sparsebert {

// y [m, n] = act(x [m, k] W^T + bias), all of one dtype, row-major and contiguous.
struct Linear {
  int64_t m, n, k;
  bool bf16;
  const void* x;
  const void* bias;  // null where there is none
  void* y;
  int act;  // Act of vec.inc

  const void* x_row(int64_t row) const { return static_cast<const char*>(x) + row * k * (bf16 ? 2 : 4); }
};

// Checks x, values and bias, allocates the output [..., N].
Linear make_linear(
    const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, int64_t n, int64_t k,
    const std::string& activation, Tensor& y);

// The number that vec.inc's Act has for this word.
int activation_number(const std::string& activation);

// A block of rows of x times a run of parts of the weight (strips, block rows).
struct Task {
  int64_t row, rows;
  int64_t part, parts;
};

// Tiles of `tile` rows; the weight's `parts` are shared out among tasks of at most `most` only where the tiles alone do
// not keep the threads busy, since every task packs its rows of x anew. Which task computes an output never changes how.
class Tasks {
 public:
  Tasks(int64_t m, int64_t tile, int64_t parts, int64_t most, int64_t least);
  int64_t size() const { return tiles_ * groups_; }
  Task at(int64_t i) const;

 private:
  int64_t m_, tile_, tiles_, parts_, groups_, per_group_;
};

}  // namespace sparsebert
