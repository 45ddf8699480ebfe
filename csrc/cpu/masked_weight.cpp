#include "masked_weight.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "tensors.h"

namespace sparsebert {
namespace {

// Weights a task handles at least: small enough to share among threads, large enough to hide the hand-out.
constexpr int64_t kTask = 1 << 16;

// Results of more bytes than a cache keeps are written past it: an ordinary store reads its line first, which is a third
// of the traffic here, and pushes out what is of use.
constexpr int64_t kStream = int64_t{32} << 20;

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

// Copies by stores that leave the caches alone, but for what lies before the first and after the last 16 aligned bytes.
void write_past_cache(char* to, const char* from, int64_t bytes) {
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(to) & 15);
  std::memcpy(to, from, head);
  int64_t i = head;
  for (; i + 16 <= bytes; i += 16) {
    const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), part);
  }
  std::memcpy(to + i, from + i, bytes - i);
}

// One bit to a weight: rows do not matter, so short rows cost nothing.
void run_elementwise(const Task& task, const RowKernels& kernels, bool stream) {
  constexpr int64_t kTile = 2048;
  uint8_t keep[kTile];
  alignas(64) char tile[kTile * 4];
  const MaskedCopy& copy = *task.copy;
  const char* in = static_cast<const char*>(copy.in);
  char* out = static_cast<char*>(copy.out);
  const int64_t in_size = size_of(copy.in_dtype), out_size = size_of(copy.out_dtype);
  for (int64_t i = task.first; i < task.first + task.count; i += kTile) {
    const int64_t n = std::min(kTile, task.first + task.count - i);
    expand_bits(copy.bits, i, n, keep);
    char* to = out + i * out_size;
    kernels.select(copy.in_dtype, in + i * in_size, keep, copy.out_dtype, stream ? tile : to, n);
    if (stream) write_past_cache(to, tile, n * out_size);
  }
}

void run_rows(const Task& task, const RowKernels& kernels, bool stream) {
  const MaskedCopy& copy = *task.copy;
  const int64_t cols = copy.grid.matrix_cols();
  std::vector<uint8_t> keep(cols + 8), scratch(copy.grid.cols + 8);
  std::vector<char> line(stream ? cols * size_of(copy.out_dtype) : 0);
  const char* in = static_cast<const char*>(copy.in);
  char* out = static_cast<char*>(copy.out);
  const int64_t in_stride = cols * size_of(copy.in_dtype), out_stride = cols * size_of(copy.out_dtype);
  int64_t expanded = -1;
  for (int64_t row = task.first; row < task.first + task.count; ++row) {
    if (row / copy.grid.height != expanded) {
      expanded = row / copy.grid.height;
      expand_row(copy.bits, copy.grid, expanded, scratch.data(), keep.data());
    }
    char* to = out + row * out_stride;
    kernels.select(
        copy.in_dtype, in + row * in_stride, keep.data(), copy.out_dtype, stream ? line.data() : to, cols);
    if (stream) write_past_cache(to, line.data(), out_stride);
  }
}

MaskedCopy copy_of(const Tensor& weight, const Tensor& bits, const std::vector<int64_t>& cells, Tensor& out) {
  check_contiguous(weight, "weight");
  check_contiguous(out, "out");
  const Grid grid = grid_on(weight, cells);
  check_bits(bits, grid.rows * grid.cols);
  STD_TORCH_CHECK(
      out.dim() == 2 && out.size(0) == weight.size(0) && out.size(1) == weight.size(1),
      "out: expected the shape of weight");
  return {grid, const_data<uint8_t>(bits), dtype_of(weight, "weight"), weight.const_data_ptr(), dtype_of(out, "out"),
          out.mutable_data_ptr()};
}

void masked_weight(Tensor weight, Tensor bits, std::vector<int64_t> cells, Tensor out) {
  copy_masked({copy_of(weight, bits, cells, out)}, active_isa());
}

void masked_weights(std::vector<Tensor> weights, std::vector<Tensor> bits, std::vector<Tensor> out) {
  STD_TORCH_CHECK(
      bits.size() == weights.size() && out.size() == weights.size(), "bits, out: expected one for each weight");
  std::vector<MaskedCopy> copies;
  for (size_t i = 0; i < weights.size(); ++i) {
    STD_TORCH_CHECK(weights[i].dim() == 2, "weights: expected matrices");
    copies.push_back(copy_of(weights[i], bits[i], {weights[i].size(0), weights[i].size(1)}, out[i]));
  }
  copy_masked(copies, active_isa());
}

}  // namespace

void copy_masked(const std::vector<MaskedCopy>& copies, Isa isa) {
  std::vector<Task> tasks;
  for (const MaskedCopy& copy : copies) append_tasks(copy, tasks);
  int64_t written = 0;
  for (const MaskedCopy& copy : copies) {
    written += copy.grid.matrix_rows() * copy.grid.matrix_cols() * size_of(copy.out_dtype);
  }
  const bool stream = written >= kStream;
  const RowKernels& kernels = row_kernels(isa);
  torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (tasks[i].copy->grid.elementwise()) run_elementwise(tasks[i], kernels, stream);
      else run_rows(tasks[i], kernels, stream);
    }
    // Streamed stores are seen by other threads only after a fence.
    if (stream) _mm_sfence();
  });
}

}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CPU, m) {
  m.impl("masked_weight", TORCH_BOX(&sparsebert::masked_weight));
  m.impl("masked_weights", TORCH_BOX(&sparsebert::masked_weights));
}
