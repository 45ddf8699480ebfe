// A 2:4 weight in the order in which semi_structured_packed_linear reads it (two_four.h).

#include <algorithm>

#include "launch.cuh"
#include "two_four.h"

namespace sparsebert {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ TwoFourPack job) {
  const int64_t units = job.shape.packed_bytes() / 16, step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t unit = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; unit < units; unit += step) {
    reinterpret_cast<Words*>(global(job.packed))[unit] = two_four_unit(job, unit);
  }
}

Tensor semi_structured_pack(Tensor values, Tensor positions) {
  check_cuda(values, values, "values");
  check_cuda(positions, values, "positions");
  const bool sixteen = values.scalar_type() == ScalarType::BFloat16 || values.scalar_type() == ScalarType::Half;
  STD_TORCH_CHECK(sixteen, "values: expected bfloat16 or float16");
  STD_TORCH_CHECK(values.dim() == 2 && values.size(1) % 2 == 0, "values: expected [N, K / 2], K a multiple of 4");
  TwoFourPack job{};
  job.shape = {values.size(0), 2 * values.size(1)};
  const int64_t bytes = (job.shape.k / 4 + 1) / 2;
  STD_TORCH_CHECK(
      positions.scalar_type() == ScalarType::Byte && positions.dim() == 2 && positions.size(0) == job.shape.n &&
          positions.size(1) == bytes,
      "positions: expected uint8 [", job.shape.n, ", ", bytes, "]");
  Tensor packed =
      empty_like(values, {job.shape.row_tiles(), job.shape.steps(), TwoFour::kPackedBytes}, ScalarType::Byte);
  if (packed.numel() == 0) return packed;
  job.values = static_cast<const uint16_t*>(values.const_data_ptr());
  job.positions = static_cast<const uint8_t*>(positions.const_data_ptr());
  job.packed = static_cast<uint8_t*>(packed.mutable_data_ptr());
  const OnDevice device(values);
  const int64_t blocks = std::min<int64_t>((packed.numel() / 16 + kThreads - 1) / kThreads, int64_t{1} << 20);
  pack_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, device.stream()>>>(job);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return packed;
}

}  // namespace
}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CUDA, m) {
  m.impl("semi_structured_pack", TORCH_BOX(&sparsebert::semi_structured_pack));
}
