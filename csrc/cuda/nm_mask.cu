// n:m masks (nm_steps.h): bound by memory, 4 bytes of scores to a bit.

#include <algorithm>
#include <optional>

#include "launch.cuh"
#include "nm_steps.h"

namespace sparsebert {
namespace {

constexpr int64_t kThreads = 256;

__global__ void __launch_bounds__(kThreads) nm_kernel(const __grid_constant__ NmJob job) {
  __shared__ NmShared shared;
  DeviceBlock<NmShared, kThreads> block{
      shared, nullptr, static_cast<int64_t>(blockIdx.x), static_cast<int64_t>(gridDim.x)};
  run_nm(block, job);
}

// What a captured graph leaves of the bits where there is a NaN: nothing, since it cannot be refused.
__global__ void __launch_bounds__(kThreads) drop_kernel(const uint64_t* nan, uint8_t* bits, int64_t bytes) {
  if (*nan == 0) return;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < bytes; i += step) bits[i] = 0;
}

Tensor nm_mask(Tensor scores, int64_t n, int64_t m, std::optional<double> threshold) {
  check_cuda(scores, scores, "scores");
  STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Float, "scores: expected float32");
  STD_TORCH_CHECK(m >= 1 && m <= 32 && n >= 0 && n <= m, "n, m: expected 0 <= n <= m <= 32, got ", n, ":", m);
  STD_TORCH_CHECK(scores.dim() == 2 && scores.size(1) % m == 0, "scores: expected [N, K] with K a multiple of ", m);
  const OnDevice device(scores);
  const int64_t count = scores.numel(), bytes = bytes_for(count);
  Tensor bits = empty_like(scores, {bytes}, ScalarType::Byte);
  if (count == 0) return bits;
  const Tensor nan = empty_like(scores, {int64_t{sizeof(uint64_t)}}, ScalarType::Byte);
  NmJob job{};
  job.scores = static_cast<const float*>(scores.const_data_ptr());
  job.count = count;
  job.m = m;
  job.keep = n;
  job.limit = nm_limit(threshold);
  job.bits = static_cast<uint8_t*>(bits.mutable_data_ptr());
  job.nan = static_cast<uint64_t*>(nan.mutable_data_ptr());
  job.wide = aligned(job.scores);
  STD_CUDA_CHECK(cudaMemsetAsync(job.nan, 0, sizeof(uint64_t), device.stream()));
  // A block strides over what this many leave; every block of a multiprocessor has work for a while.
  const int64_t most = int64_t{16} * device.attribute(cudaDevAttrMultiProcessorCount);
  const int64_t wanted = m == 2 || m == 4 || m == 8 ? (bytes + kThreads - 1) / kThreads : count / nm_tile(m) + 1;
  const auto blocks = static_cast<unsigned>(std::min(wanted, most));
  nm_kernel<<<blocks, kThreads, 0, device.stream()>>>(job);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (device.capturing()) {
    drop_kernel<<<blocks, kThreads, 0, device.stream()>>>(job.nan, job.bits, bytes);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return bits;
  }
  STD_TORCH_CHECK(device.read_word(job.nan) == 0, "scores: has a NaN");
  return bits;
}

}  // namespace
}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CUDA, m) {
  m.impl("nm_mask", TORCH_BOX(&sparsebert::nm_mask));
}
