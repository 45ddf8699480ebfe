// W·mask on the GPU: where(kept, weight, 0), cast on the way. Bound by memory: each thread moves 16 bytes of the wider
// of the two dtypes at a time, and the bits (1/32 of an fp32 weight) come from L1.

#include <algorithm>
#include <vector>

#include "launch.cuh"

namespace sparsebert {
namespace {

constexpr int kThreads = 256;

template <typename T>
__device__ inline float to_float(T value);
template <>
__device__ inline float to_float(float value) {
  return value;
}
template <>
__device__ inline float to_float(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
template <>
__device__ inline float to_float(__half value) {
  return __half2float(value);
}

template <typename T>
__device__ inline T from_float(float value);
template <>
__device__ inline float from_float(float value) {
  return value;
}
template <>
__device__ inline __nv_bfloat16 from_float(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline __half from_float(float value) {
  return __float2half_rn(value);
}

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T lane[N];
};

// N consecutive weights of one row to a thread. One bit to a weight (kElementwise, not worth a
// second body where N is 1) needs no division: a byte holds the bits of all N.
template <typename In, typename Out, int N, bool kElementwise>
__global__ void __launch_bounds__(kThreads)
    masked_weight_kernel(const In* weight, const uint8_t* bits, Grid grid, int64_t total, Out* out) {
  static_assert(kUnit % N == 0);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * N;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * N; i < total; i += stride) {
    const Pack<In, N> in = *reinterpret_cast<const Pack<In, N>*>(weight + i);
    const uint32_t kept = kElementwise ? bits[i / kUnit] >> (i % kUnit) : kept_of_matrix(bits, grid, i, N);
    Pack<Out, N> result;
#pragma unroll
    for (int lane = 0; lane < N; ++lane) {
      result.lane[lane] = from_float<Out>(((kept >> lane) & 1u) != 0 ? to_float(in.lane[lane]) : 0.0f);
    }
    *reinterpret_cast<Pack<Out, N>*>(out + i) = result;
  }
}

template <typename In, typename Out, int N>
void launch_lanes(
    const Tensor& weight, const Tensor& bits, const Grid& grid, const Tensor& out, cudaStream_t stream) {
  const int64_t total = weight.numel(), per_block = int64_t{kThreads} * N;
  // The kernel strides over what this many blocks leave.
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((total + per_block - 1) / per_block, 1 << 16));
  const auto* in = static_cast<const In*>(weight.const_data_ptr());
  const auto* packed = static_cast<const uint8_t*>(bits.const_data_ptr());
  auto* result = static_cast<Out*>(out.mutable_data_ptr());
  if (N > 1 && grid.elementwise()) {
    masked_weight_kernel<In, Out, N, (N > 1)><<<blocks, kThreads, 0, stream>>>(in, packed, grid, total, result);
  } else {
    masked_weight_kernel<In, Out, N, false><<<blocks, kThreads, 0, stream>>>(in, packed, grid, total, result);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename In, typename Out>
void launch(const Tensor& weight, const Tensor& bits, const Grid& grid, const Tensor& out, cudaStream_t stream) {
  constexpr int kLanes = 16 / std::max(sizeof(In), sizeof(Out));
  const bool wide =
      grid.matrix_cols() % kLanes == 0 && aligned(weight.const_data_ptr()) && aligned(out.const_data_ptr());
  if (wide) launch_lanes<In, Out, kLanes>(weight, bits, grid, out, stream);
  else launch_lanes<In, Out, 1>(weight, bits, grid, out, stream);
}

template <typename F>
void with_type(ScalarType dtype, const char* name, F&& f) {
  if (dtype == ScalarType::Float) f(float{});
  else if (dtype == ScalarType::BFloat16) f(__nv_bfloat16{});
  else if (dtype == ScalarType::Half) f(__half{});
  else STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
}

void masked_weight(Tensor weight, Tensor bits, std::vector<int64_t> cells, Tensor out) {
  check_cuda(weight, weight, "weight");
  check_cuda(out, weight, "out");
  STD_TORCH_CHECK(cells.size() == 2, "grid: expected two sizes, got ", cells.size());
  const Grid grid = grid_on(weight, cells[0], cells[1]);
  STD_TORCH_CHECK(
      out.dim() == 2 && out.size(0) == weight.size(0) && out.size(1) == weight.size(1),
      "out: expected the shape of weight");
  check_bits(bits, weight, grid.rows * grid.cols);
  if (weight.numel() == 0) return;
  const OnDevice device(weight);
  with_type(weight.scalar_type(), "weight", [&](auto in) {
    with_type(out.scalar_type(), "out", [&](auto result) {
      launch<decltype(in), decltype(result)>(weight, bits, grid, out, device.stream());
    });
  });
}

}  // namespace
}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CUDA, m) {
  m.impl("masked_weight", TORCH_BOX(&sparsebert::masked_weight));
}
