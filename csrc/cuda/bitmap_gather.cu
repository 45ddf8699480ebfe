// The elements of a dense matrix at a bitmap's places, in the order of its values, a warp to a tile.

#include <algorithm>

#include "bitmap.cuh"

namespace sparsebert {
namespace {

constexpr int kThreads = 32 * kBitmapWarps;

__global__ void __launch_bounds__(kThreads) gather_kernel(
    const __grid_constant__ BitmapWeight weight, const uint16_t* dense, bool wide, uint16_t* values) {
  __shared__ BitmapStage stages[kBitmapWarps];
  DeviceBitmapWarp<1, Float::bf16> warp(threadIdx.x % 32);
  const int64_t number = threadIdx.x / 32, step = static_cast<int64_t>(gridDim.x) * kBitmapWarps;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kBitmapWarps + number; tile < weight.tiles(); tile += step) {
    bitmap_read_tile(warp, weight, stages[number], tile, dense, wide, values);
  }
}

Tensor bitmap_gather(Tensor dense, Tensor bits, Tensor starts, int64_t nnz) {
  check_cuda(dense, dense, "dense");
  check_sixteen_bits(dense, "dense");
  STD_TORCH_CHECK(dense.dim() == 2, "dense: expected [N, K]");
  STD_TORCH_CHECK(nnz >= 0 && nnz <= dense.numel(), "nnz: expected 0 to ", dense.numel(), ", got ", nnz);
  const OnDevice device(dense);
  Tensor values = empty_like(dense, {nnz}, dense.scalar_type());
  const BitmapWeight weight = bitmap_weight(nullptr, nnz, bits, starts, {dense.size(0), dense.size(1)}, dense);
  if (nnz == 0) return values;
  const int64_t blocks = std::min<int64_t>((weight.tiles() + kBitmapWarps - 1) / kBitmapWarps, int64_t{1} << 20);
  const auto* from = static_cast<const uint16_t*>(dense.const_data_ptr());
  const bool wide = weight.k % kUnit == 0 && aligned(from);
  gather_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, device.stream()>>>(
      weight, from, wide, static_cast<uint16_t*>(values.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return values;
}

}  // namespace
}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CUDA, m) {
  m.impl("bitmap_gather", TORCH_BOX(&sparsebert::bitmap_gather));
}
