#include "masked_weight.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>

#include "tensors.h"

namespace sparsebert {
namespace {

// Weights a task handles at least: small enough to share among threads, large enough to hide the hand-out.
constexpr int64_t kTask = 1 << 16;

struct Task {
  const MaskedCopy* copy;
  int64_t first;  // row, or element where there is one bit to a weight
  int64_t count;
};

void append_tasks(const MaskedCopy& copy, std::vector<Task>& tasks) {
  const int64_t rows = copy.grid.matrix_rows(), cols = copy.grid.matrix_cols();
  if (rows * cols == 0) return;
  const int64_t total = copy.grid.elementwise() ? rows * cols : rows;
  const int64_t step = copy.grid.elementwise() ? kTask : std::max<int64_t>(1, kTask / cols);
  for (int64_t first = 0; first < total; first += step) tasks.push_back({&copy, first, std::min(step, total - first)});
}

// One bit to a weight: rows do not matter, so short rows cost nothing.
void run_elementwise(const Task& task, const RowKernels& kernels) {
  constexpr int64_t kTile = 2048;
  uint8_t keep[kTile];
  const MaskedCopy& copy = *task.copy;
  const char* in = static_cast<const char*>(copy.in);
  char* out = static_cast<char*>(copy.out);
  const int64_t in_size = size_of(copy.in_dtype), out_size = size_of(copy.out_dtype);
  for (int64_t i = task.first; i < task.first + task.count; i += kTile) {
    const int64_t n = std::min(kTile, task.first + task.count - i);
    expand_bits(copy.bits, i, n, keep);
    kernels.select(copy.in_dtype, in + i * in_size, keep, copy.out_dtype, out + i * out_size, n);
  }
}

void run_rows(const Task& task, const RowKernels& kernels) {
  const MaskedCopy& copy = *task.copy;
  const int64_t cols = copy.grid.matrix_cols();
  std::vector<uint8_t> keep(cols + 8), scratch(copy.grid.cols + 8);
  const char* in = static_cast<const char*>(copy.in);
  char* out = static_cast<char*>(copy.out);
  const int64_t in_stride = cols * size_of(copy.in_dtype), out_stride = cols * size_of(copy.out_dtype);
  int64_t expanded = -1;
  for (int64_t row = task.first; row < task.first + task.count; ++row) {
    if (row / copy.grid.height != expanded) {
      expanded = row / copy.grid.height;
      expand_row(copy.bits, copy.grid, expanded, scratch.data(), keep.data());
    }
    kernels.select(copy.in_dtype, in + row * in_stride, keep.data(), copy.out_dtype, out + row * out_stride, cols);
  }
}

void masked_weight(Tensor weight, Tensor bits, std::vector<int64_t> cells, Tensor out) {
  check_contiguous(weight, "weight");
  check_contiguous(out, "out");
  const Grid grid = grid_on(weight, cells);
  check_bits(bits, grid.rows * grid.cols);
  STD_TORCH_CHECK(
      out.dim() == 2 && out.size(0) == weight.size(0) && out.size(1) == weight.size(1),
      "out: expected the shape of weight");
  copy_masked({{grid, const_data<uint8_t>(bits), dtype_of(weight, "weight"), weight.const_data_ptr(),
                dtype_of(out, "out"), out.mutable_data_ptr()}},
              active_isa());
}

}  // namespace

void copy_masked(const std::vector<MaskedCopy>& copies, Isa isa) {
  std::vector<Task> tasks;
  for (const MaskedCopy& copy : copies) append_tasks(copy, tasks);
  const RowKernels& kernels = row_kernels(isa);
  torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (tasks[i].copy->grid.elementwise()) run_elementwise(tasks[i], kernels);
      else run_rows(tasks[i], kernels);
    }
  });
}

}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CPU, m) {
  m.impl("masked_weight", TORCH_BOX(&sparsebert::masked_weight));
}
