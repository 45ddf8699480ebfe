#include <immintrin.h>
#include <torch/csrc/stable/library.h>

#include "block_sparse.h"
#include "sddmm.h"

namespace sparsebert {
namespace {

constexpr int64_t kChunk = 512;  // rows of x at a time: a block row's share of them stays in L1

struct BlockSparseSddmmKernel {
  void (*pack_rows)(const Sampled& p, bool gradient, int64_t first, int64_t lanes, float* out);
  bool (*gain_block_row)(
      const BlockSparse& w, int64_t row, const float* grad, const float* x, int64_t rows, float* sums);
  void (*round)(const float* sums, int64_t n, uint16_t* out);
};

#define SB_FILE "block_sparse_sddmm.inc"
#include "each_isa.inc"

const BlockSparseSddmmKernel& kernel_for(Isa isa) {
  if (isa == Isa::avx512) return avx512::kernel;
  if (isa == Isa::avx2) return avx2::kernel;
  return generic::kernel;
}

// Rows of a matrix as feature-major chunks, packed by all threads: each takes some rows, 16 at a time.
void pack_chunk(const BlockSparseSddmmKernel& kernel, const Sampled& p, int64_t first, int64_t lanes, float* grad,
                float* x) {
  torch::stable::parallel_for(0, 2, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernel.pack_rows(p, i == 0, first, lanes, i == 0 ? grad : x);
  });
}

Tensor block_sparse_sddmm(
    Tensor grad, Tensor x, Tensor columns, Tensor row_starts, std::vector<int64_t> block) {
  STD_TORCH_CHECK(block.size() == 2, "block: expected [R, C]");
  const Sampled p = check_sampled(grad, x);
  const BlockSparse w = check_block_sparse(columns, row_starts, p.n, p.k, block[0], block[1]);
  const Tensor out = empty({w.blocks, w.height, w.width}, x.scalar_type());
  const int64_t nnz = out.numel();
  if (nnz == 0) return out;
  const BlockSparseSddmmKernel& kernel = kernel_for(active_isa());
  const int64_t most = std::min<int64_t>((p.m + 15) / 16 * 16, kChunk);
  const Scratch packed((p.n + p.k) * most);
  const Scratch own(p.bf16 ? nnz : 1);
  float* const sums = p.bf16 ? own.get() : data<float>(out);
  std::fill(sums, sums + nnz, 0.0f);
  std::atomic<bool> fits{true};
  for (int64_t first = 0; first < p.m; first += kChunk) {
    const int64_t lanes = std::min<int64_t>((p.m - first + 15) / 16 * 16, kChunk);
    float* const packed_x = packed.get() + p.n * lanes;
    pack_chunk(kernel, p, first, lanes, packed.get(), packed_x);
    torch::stable::parallel_for(0, w.block_rows(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (!kernel.gain_block_row(w, i, packed.get(), packed_x, lanes, sums)) fits = false;
      }
    });
  }
  STD_TORCH_CHECK(fits, "columns: expected to be below ", w.block_columns());
  if (p.bf16) kernel.round(sums, nnz, data<uint16_t>(out));
  return out;
}

}  // namespace
}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CPU, m) {
  m.impl("block_sparse_sddmm", TORCH_BOX(&sparsebert::block_sparse_sddmm));
}
