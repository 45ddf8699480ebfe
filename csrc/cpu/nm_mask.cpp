#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>

#include "scan.h"
#include "tensors.h"

namespace sparsebert {
namespace {

Tensor nm_mask(Tensor scores, int64_t n, int64_t m, std::optional<double> threshold) {
  check_contiguous(scores, "scores");
  STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Float, "scores: expected float32");
  STD_TORCH_CHECK(m >= 1 && m <= 32 && n >= 0 && n <= m, "n, m: expected 0 <= n <= m <= 32, got ", n, ":", m);
  STD_TORCH_CHECK(scores.dim() == 2 && scores.size(1) % m == 0, "scores: expected [N, K] with K a multiple of ", m);
  const int64_t groups = scores.numel() / m;
  Tensor bits = empty({bytes_for(scores.numel())}, ScalarType::Byte);
  const float* x = const_data<float>(scores);
  auto* packed = data<uint8_t>(bits);
  const float floor = threshold ? float_below(*threshold) : std::numeric_limits<float>::infinity();
  const ScanKernels& kernels = scan_kernels(active_isa());
  // A multiple of 8 groups, so that every task's bits start on a byte.
  const int64_t step = std::max<int64_t>(8, (int64_t{1} << 16) / m / 8 * 8);
  const int64_t tasks = (groups + step - 1) / step;
  std::vector<uint8_t> nan(tasks, 0);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * step, count = std::min(step, groups - first);
      nan[task] = kernels.pack_groups(
          x + first * m, count, static_cast<int>(n), static_cast<int>(m), floor, packed + first * m / 8);
    }
  });
  STD_TORCH_CHECK(std::find(nan.begin(), nan.end(), 1) == nan.end(), "scores: has a NaN");
  return bits;
}

}  // namespace
}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CPU, m) {
  m.impl("nm_mask", TORCH_BOX(&sparsebert::nm_mask));
}
