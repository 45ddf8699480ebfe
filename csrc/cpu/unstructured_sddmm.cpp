#include <immintrin.h>
#include <torch/csrc/stable/library.h>

#include "sddmm.h"
#include "unstructured.h"

namespace sparsebert {
namespace {

constexpr int64_t kChunks = 16;  // of rows of x that are packed at a time: bounds the memory, whatever M is

struct UnstructuredSddmmKernel {
  void (*pack_rows)(const Sampled& p, bool gradient, int64_t first, int64_t lanes, float* out);
  bool (*gain_tile)(
      const TiledCsr& w, int64_t strip, int64_t panel, const float* grad, const float* x, float* sums);
  void (*round)(const float* sums, int64_t n, uint16_t* out);
  int64_t tile;
};

#define SB_FILE "unstructured_sddmm.inc"
#include "each_isa.inc"

const UnstructuredSddmmKernel& kernel_for(Isa isa) {
  if (isa == Isa::avx512) return avx512::kernel;
  if (isa == Isa::avx2) return avx2::kernel;
  return generic::kernel;
}

Tensor unstructured_sddmm(Tensor grad, Tensor x, Tensor offsets, Tensor rows, Tensor counts, Tensor starts) {
  const Sampled p = check_sampled(grad, x);
  const int64_t nnz = offsets.numel();
  const TiledCsr w = check_tiled_csr(nnz, offsets, rows, counts, starts, p.n, p.k);
  const Tensor out = empty({nnz}, x.scalar_type());
  if (nnz == 0) return out;
  const UnstructuredSddmmKernel& kernel = kernel_for(active_isa());
  // The last panel's buffer must hold what a byte can name; beyond x's columns it is 0.
  const int64_t columns = (w.panels() - 1) * kPanel + kOffsets;
  const int64_t chunk = (p.n + columns) * kernel.tile;
  const int64_t chunks = (p.m + kernel.tile - 1) / kernel.tile;
  const Scratch packed(std::min(kChunks, chunks) * chunk);
  const Scratch own(p.bf16 ? nnz : 1);
  float* const sums = p.bf16 ? own.get() : data<float>(out);
  std::fill(sums, sums + nnz, 0.0f);
  std::atomic<bool> fits{true};
  for (int64_t first = 0; first < chunks; first += kChunks) {
    const int64_t here = std::min(kChunks, chunks - first);
    torch::stable::parallel_for(0, 2 * here, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float* to = packed.get() + i / 2 * chunk + (i % 2 == 0 ? 0 : p.n * kernel.tile);
        kernel.pack_rows(p, i % 2 == 0, (first + i / 2) * kernel.tile, kernel.tile, to);
        if (i % 2 != 0) std::fill(to + p.k * kernel.tile, to + columns * kernel.tile, 0.0f);
      }
    });
    torch::stable::parallel_for(0, w.strips() * w.panels(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t strip = i / w.panels(), panel = i % w.panels();
        for (int64_t c = 0; c < here; ++c) {
          const float* g = packed.get() + c * chunk;
          const float* xs = g + (p.n + panel * kPanel) * kernel.tile;
          if (!kernel.gain_tile(w, strip, panel, g + strip * kStrip * kernel.tile, xs, sums)) fits = false;
        }
      }
    });
  }
  STD_TORCH_CHECK(fits, "counts: a tile's do not add up to its part of starts");
  if (p.bf16) kernel.round(sums, nnz, data<uint16_t>(out));
  return out;
}

}  // namespace
}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CPU, m) {
  m.impl("unstructured_sddmm", TORCH_BOX(&sparsebert::unstructured_sddmm));
}
