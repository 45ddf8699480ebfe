#include <immintrin.h>
#include <torch/csrc/stable/library.h>

#include "linear.h"
#include "unstructured.h"

namespace sparsebert {
namespace {

constexpr int64_t kMostRows = 1024;  // of the weight in a task: their outputs take a quarter of L2
constexpr int64_t kLeastRows = 64;

// An n:m weight, read in panels of whole groups.
struct SemiStructured {
  int64_t n, k;
  int64_t kept, group;  // n of m
  int bits;             // of a position
  const void* values;
  const uint8_t* positions;
  int64_t row_values, row_bytes;
  int64_t panel;                // columns
  uint8_t bases[kOffsets];      // the first column, within a panel, of each stored weight's group

  int64_t panels() const { return (k + panel - 1) / panel; }
  int64_t columns_in(int64_t i) const { return i + 1 < panels() ? panel : k - i * panel; }
  // The first stored weight of a panel, within its row.
  int64_t first(int64_t i) const { return std::min(i * panel, k) / group * kept; }
};

struct SemiStructuredKernel {
  void (*run)(const Linear& p, const SemiStructured& w, const Task& task, float* scratch);
  int64_t tile;  // rows of x in a task
};

#define SB_FILE "semi_structured_linear.inc"
#include "each_isa.inc"

const SemiStructuredKernel& kernel_for(Isa isa) {
  if (isa == Isa::avx512) return avx512::kernel;
  if (isa == Isa::avx2) return avx2::kernel;
  return generic::kernel;
}

SemiStructured check(const Tensor& values, const Tensor& positions, const std::vector<int64_t>& pattern) {
  STD_TORCH_CHECK(
      pattern.size() == 2 && pattern[0] > 0 && pattern[0] <= pattern[1] && pattern[1] <= 256,
      "pattern: expected n:m with 0 < n <= m <= 256");
  const int64_t kept = pattern[0], group = pattern[1];
  STD_TORCH_CHECK(values.dim() == 2 && values.size(1) <= kMostSize && values.size(1) % kept == 0,
                  "values: expected [N, K / m * n]");
  SemiStructured w{values.size(0), values.size(1) / kept * group, kept, group, group <= 4 ? 2 : group <= 16 ? 4 : 8,
                   values.const_data_ptr(), nullptr, values.size(1), 0, group >= kPanel ? group : kPanel / group * group,
                   {}};
  w.row_bytes = (w.row_values * w.bits + 7) / 8;
  check_contiguous(positions, "positions");
  STD_TORCH_CHECK(
      positions.scalar_type() == ScalarType::Byte && positions.dim() == 2 && positions.size(0) == w.n &&
          positions.size(1) == w.row_bytes,
      "positions: expected uint8 [", w.n, ", ", w.row_bytes, "]");
  w.positions = const_data<uint8_t>(positions);
  for (int64_t i = 0; i < w.panel / group * kept; ++i) w.bases[i] = static_cast<uint8_t>(i / kept * group);
  return w;
}

Tensor semi_structured_linear(
    Tensor x, Tensor values, Tensor positions, std::optional<Tensor> bias, std::vector<int64_t> pattern,
    std::string activation, std::vector<Tensor> transposed) {
  const SemiStructured w = check(values, positions, pattern);
  Tensor y;
  const Linear p = make_linear(x, values, bias, w.n, w.k, activation, y);
  if (p.m == 0 || p.n == 0) return y;
  const SemiStructuredKernel& kernel = kernel_for(active_isa());
  const Tasks tasks(p.m, kernel.tile, w.n, kMostRows, kLeastRows);
  torch::stable::parallel_for(0, tasks.size(), 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch((kOffsets + kMostRows) * kernel.tile);
    for (int64_t i = begin; i < end; ++i) kernel.run(p, w, tasks.at(i), scratch.get());
  });
  return y;
}

}  // namespace
}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CPU, m) {
  m.impl("semi_structured_linear", TORCH_BOX(&sparsebert::semi_structured_linear));
}
