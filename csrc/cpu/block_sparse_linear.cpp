#include <immintrin.h>
#include <torch/csrc/stable/library.h>

#include "block_sparse.h"
#include "linear.h"

namespace sparsebert {
namespace {

constexpr int64_t kGroup = 64;  // rows of the weight whose outputs are written out together
constexpr int64_t kAhead = 6;   // blocks that x is fetched ahead

struct BlockSparseKernel {
  bool (*run)(const Linear& p, const BlockSparse& w, const Task& task, float* scratch);
  int64_t (*tile)(int64_t height);  // rows of x in a task
};

#define SB_FILE "block_sparse_linear.inc"
#define SB_WITH_BF16
#include "each_isa.inc"

const BlockSparseKernel& kernel_for(Isa isa) {
  if (use_avx512_bf16()) return avx512_bf16::kernel;
  if (isa == Isa::avx512) return avx512::kernel;
  if (isa == Isa::avx2) return avx2::kernel;
  return generic::kernel;
}

Tensor block_sparse_linear(
    Tensor x, Tensor values, Tensor columns, Tensor row_starts, std::optional<Tensor> bias,
    std::vector<int64_t> shape, std::string activation, std::vector<Tensor> transposed) {
  STD_TORCH_CHECK(shape.size() == 2, "shape: expected [N, K]");
  STD_TORCH_CHECK(values.dim() == 3, "values: expected [B, R, C], got ", values.dim(), " dimensions");
  BlockSparse w = check_block_sparse(columns, row_starts, shape[0], shape[1], values.size(1), values.size(2));
  STD_TORCH_CHECK(values.size(0) == w.blocks, "values: expected ", w.blocks, " blocks, got ", values.size(0));
  w.values = values.const_data_ptr();
  Tensor y;
  const Linear p = make_linear(x, values, bias, w.n, w.k, activation, y);
  if (p.m == 0 || p.n == 0) return y;
  const BlockSparseKernel& kernel = kernel_for(active_isa());
  const int64_t least = std::max<int64_t>(kGroup / w.height, 1);
  const int64_t tile = kernel.tile(w.height);
  const Tasks tasks(p.m, tile, w.block_rows(), w.block_rows(), least);
  std::atomic<bool> fits{true};
  torch::stable::parallel_for(0, tasks.size(), 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch((p.k + std::max(kGroup, w.height)) * tile);
    for (int64_t i = begin; i < end; ++i) {
      if (!kernel.run(p, w, tasks.at(i), scratch.get())) fits = false;
    }
  });
  STD_TORCH_CHECK(fits, "columns: expected to be below ", w.block_columns());
  return y;
}

}  // namespace
}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CPU, m) {
  m.impl("block_sparse_linear", TORCH_BOX(&sparsebert::block_sparse_linear));
}
