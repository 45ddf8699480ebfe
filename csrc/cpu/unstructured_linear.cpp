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

Tensor unstructured_linear(
    Tensor x, Tensor values, Tensor offsets, Tensor rows, Tensor counts, Tensor starts,
    std::optional<Tensor> bias, std::vector<int64_t> shape, std::string activation, std::vector<Tensor> transposed) {
  STD_TORCH_CHECK(shape.size() == 2, "shape: expected [N, K]");
  STD_TORCH_CHECK(values.dim() == 1, "values: expected [nnz], got ", values.dim(), " dimensions");
  TiledCsr w = check_tiled_csr(values.numel(), offsets, rows, counts, starts, shape[0], shape[1]);
  w.values = values.const_data_ptr();
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
