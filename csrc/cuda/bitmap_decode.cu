// A bitmap's dense weight, a warp to a tile: what gradients, and products with many rows of x, are computed from.

#include <algorithm>

#include "bitmap.cuh"

namespace sparsebert {
namespace {

constexpr int kThreads = 32 * kBitmapWarps;

__global__ void __launch_bounds__(kThreads)
    decode_kernel(const __grid_constant__ BitmapWeight weight, uint16_t* dense, bool wide) {
  __shared__ BitmapStage stages[kBitmapWarps];
  const int64_t number = threadIdx.x / 32;
  // The lanes' registers are the same for either type: bits are moved and no more.
  DeviceBitmapWarp<1, Float::bf16> warp(threadIdx.x % 32);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBitmapWarps;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kBitmapWarps + number; tile < weight.tiles(); tile += step) {
    bitmap_write_tile(warp, weight, stages[number], tile, dense, wide);
  }
}

Tensor bitmap_decode(Tensor values, Tensor bits, Tensor starts, std::vector<int64_t> shape) {
  check_cuda(values, values, "values");
  check_sixteen_bits(values, "values");
  STD_TORCH_CHECK(values.dim() == 1, "values: expected [nnz]");
  const OnDevice device(values);
  const Tensor even = on_sixteen(values);
  const BitmapWeight weight = bitmap_weight(even.const_data_ptr(), even.numel(), bits, starts, shape, values);
  Tensor dense = empty_like(values, shape, values.scalar_type());
  if (weight.tiles() > 0) write_dense(weight, static_cast<uint16_t*>(dense.mutable_data_ptr()), device.stream());
  return dense;
}

}  // namespace

void write_dense(const BitmapWeight& weight, uint16_t* dense, cudaStream_t stream) {
  // The kernel strides over what this many blocks leave.
  const int64_t blocks = std::min<int64_t>((weight.tiles() + kBitmapWarps - 1) / kBitmapWarps, int64_t{1} << 20);
  const bool wide = weight.k % kUnit == 0 && aligned(dense);
  decode_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(weight, dense, wide);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CUDA, m) {
  m.impl("bitmap_decode", TORCH_BOX(&sparsebert::bitmap_decode));
}
