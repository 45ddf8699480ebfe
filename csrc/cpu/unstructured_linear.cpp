#include <immintrin.h>
#include <torch/csrc/stable/library.h>

#include "linear.h"
#include "unstructured.h"

namespace sparsebert {
namespace {

constexpr int64_t kFewRows = 2;      // up to here a row of x goes through registers, without lanes left idle
constexpr int64_t kMostStrips = 4;   // whose outputs, 64 rows of x wide, take a quarter of L2

struct UnstructuredKernel {
  bool (*run)(const Linear& p, const TiledCsr& w, const Task& task, float* scratch);
  int64_t tile;  // rows of x in a task
};

#define SB_FILE "unstructured_linear.inc"
#include "each_isa.inc"

const UnstructuredKernel& kernel_for(Isa isa) {
  if (isa == Isa::avx512) return avx512::kernel;
  if (isa == Isa::avx2) return avx2::kernel;
  return generic::kernel;
}

TiledCsr check(
    const Tensor& values, const Tensor& offsets, const Tensor& rows, const Tensor& counts, const Tensor& starts,
    const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(shape.size() == 2 && shape[0] >= 0 && shape[1] > 0, "shape: expected [N, K] with K > 0");
  for (const auto& [tensor, name] : {std::pair{&offsets, "offsets"}, {&rows, "rows"}, {&counts, "counts"}, {&starts, "starts"}}) {
    check_contiguous(*tensor, name);
    STD_TORCH_CHECK(tensor->dim() == 1, name, ": expected one dimension");
  }
  STD_TORCH_CHECK(
      offsets.scalar_type() == ScalarType::Byte && rows.scalar_type() == ScalarType::Byte &&
          counts.scalar_type() == ScalarType::Byte && starts.scalar_type() == ScalarType::Long,
      "offsets, rows, counts, starts: expected uint8, uint8, uint8, int64");
  const TiledCsr w{shape[0], shape[1], values.const_data_ptr(), const_data<uint8_t>(offsets),
                   const_data<uint8_t>(rows), const_data<uint8_t>(counts), const_data<int64_t>(starts)};
  const int64_t nnz = values.numel(), tiles = w.strips() * w.panels();
  STD_TORCH_CHECK(offsets.numel() == nnz, "offsets: expected [", nnz, "], got ", offsets.numel(), " entries");
  STD_TORCH_CHECK(
      rows.numel() == w.panels() * w.n && counts.numel() == rows.numel(), "rows, counts: expected [", w.panels() * w.n,
      "], got ", rows.numel(), " and ", counts.numel(), " entries");
  STD_TORCH_CHECK(starts.numel() == tiles + 1, "starts: expected [", tiles + 1, "], got ", starts.numel(), " entries");
  bool ascending = w.starts[0] == 0 && w.starts[tiles] == nnz;
  for (int64_t i = 0; i < tiles; ++i) ascending &= w.starts[i] <= w.starts[i + 1];
  STD_TORCH_CHECK(ascending, "starts: expected to rise from 0 to ", nnz);
  return w;
}

Tensor unstructured_linear(
    Tensor x, Tensor values, Tensor offsets, Tensor rows, Tensor counts, Tensor starts,
    std::optional<Tensor> bias, std::vector<int64_t> shape, std::string activation, std::vector<Tensor> transposed) {
  const TiledCsr w = check(values, offsets, rows, counts, starts, shape);
  Tensor y;
  const Linear p = make_linear(x, values, bias, w.n, w.k, activation, y);
  if (p.m == 0 || p.n == 0) return y;
  const UnstructuredKernel& kernel = kernel_for(active_isa());
  const Tasks tasks(p.m, kernel.tile, w.strips(), kMostStrips, 1);
  std::atomic<bool> fits{true};
  torch::stable::parallel_for(0, tasks.size(), 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch((kOffsets + kMostStrips * kStrip) * kernel.tile);
    for (int64_t i = begin; i < end; ++i) {
      if (!kernel.run(p, w, tasks.at(i), scratch.get())) fits = false;
    }
  });
  STD_TORCH_CHECK(fits, "counts: a tile's do not add up to its part of starts");
  return y;
}

}  // namespace
}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CPU, m) {
  m.impl("unstructured_linear", TORCH_BOX(&sparsebert::unstructured_linear));
}
