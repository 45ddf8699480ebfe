// A linear layer over a bitmap. With few rows of x it is bound by reading the weight: each warp streams its tiles' bits
// and values to shared memory and decodes them straight into tensor-core operands (bitmap.h). One row of x needs no
// body of its own: what costs is the decoding, and 4 products of tensor cores for it are fewer instructions than 32
// multiplications a lane. With many rows it is bound by arithmetic, of which no zero can be skipped: the weight is
// decoded once into a scratch, which the caching allocator gives to the next layer again, and the product is cuBLAS's.

#include <algorithm>
#include <array>
#include <optional>
#include <string>

#include "bitmap.cuh"

namespace sparsebert {
namespace {

constexpr int kThreads = 32 * kBitmapWarps;
// Rows of x up to which the weight is decoded by each block that multiplies it; kernels/_bitmap_costs.py knows it too.
constexpr int64_t kFewRows = 256;

template <int T>
constexpr size_t shared_bytes() {
  return std::max<size_t>(
      sizeof(BitmapStage) * kBitmapWarps * kBitmapStages, sizeof(float) * kBitmapWarps * 8 * T * kBitmapPitch);
}

template <int T, Float kType>
__global__ void __launch_bounds__(kThreads, 2) linear_kernel(const __grid_constant__ BitmapJob job) {
  extern __shared__ uint4 memory[];
  const int64_t number = threadIdx.x / 32, block = static_cast<int64_t>(blockIdx.x),
                token_tile = static_cast<int64_t>(blockIdx.y), split = static_cast<int64_t>(blockIdx.z);
  DeviceBitmapWarp<T, kType> warp(threadIdx.x % 32);
  auto* stages = reinterpret_cast<BitmapStage*>(memory) + number * kBitmapStages;
  bitmap_multiply<T>(warp, job, bitmap_part(job.plan, block, token_tile, split, number), stages);
  // The sums take the stages' place.
  warp.wait_all();
  __syncthreads();
  auto* sums = reinterpret_cast<float*>(memory);
  bitmap_publish<T>(warp, sums + number * 8 * T * kBitmapPitch);
  __syncthreads();
  bitmap_add(kType, job, block, token_tile, split, sums, threadIdx.x, kThreads);
}

template <Float kType>
__global__ void __launch_bounds__(kThreads) splits_kernel(const __grid_constant__ BitmapJob job) {
  bitmap_add_splits(
      kType, job, static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x,
      static_cast<int64_t>(gridDim.x) * kThreads);
}

template <int T, Float kType>
void launch(const BitmapJob& job, cudaStream_t stream) {
  constexpr size_t kBytes = shared_bytes<T>();
  STD_CUDA_CHECK(cudaFuncSetAttribute(
      linear_kernel<T, kType>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kBytes)));
  const dim3 grid(
      static_cast<unsigned>(job.plan.row_blocks()), static_cast<unsigned>(job.plan.token_tiles),
      static_cast<unsigned>(job.plan.splits));
  linear_kernel<T, kType><<<grid, kThreads, kBytes, stream>>>(job);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (job.partial == nullptr) return;
  const int64_t blocks = std::min<int64_t>((job.m * job.weight.n + kThreads - 1) / kThreads, int64_t{1} << 20);
  splits_kernel<kType><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(job);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <Float kType>
void launch_groups(const BitmapJob& job, cudaStream_t stream) {
  switch (job.plan.groups) {
    case 1: return launch<1, kType>(job, stream);
    case 2: return launch<2, kType>(job, stream);
    case 4: return launch<4, kType>(job, stream);
    default: return launch<8, kType>(job, stream);
  }
}

Tensor dense_product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Epilogue epilogue) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor y = torch::stable::detail::to<Tensor>(stack[0]);
  if (epilogue == Epilogue::none) return y;
  const bool is_gelu = epilogue == Epilogue::gelu || epilogue == Epilogue::gelu_tanh;
  std::array<StableIValue, 2> after{from(y), from(std::string(epilogue == Epilogue::gelu_tanh ? "tanh" : "none"))};
  const char* const name = is_gelu ? "aten::gelu" : epilogue == Epilogue::relu ? "aten::relu" : "aten::tanh";
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", after.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(after[0]);
}

void check_operands(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, int64_t n, int64_t k) {
  check_cuda(x, values, "x");
  STD_TORCH_CHECK(
      x.dim() > 0 && x.size(x.dim() - 1) == k && x.scalar_type() == values.scalar_type(), "x: expected [..., ", k,
      "] in the dtype of values");
  if (!bias) return;
  check_cuda(*bias, values, "bias");
  STD_TORCH_CHECK(
      bias->dim() == 1 && bias->size(0) == n && bias->scalar_type() == values.scalar_type(), "bias: expected [", n,
      "] in the dtype of values");
}

Tensor bitmap_linear(
    Tensor x, Tensor values, Tensor bits, Tensor starts, std::optional<Tensor> bias, std::vector<int64_t> shape,
    std::string activation) {
  check_cuda(values, values, "values");
  check_sixteen_bits(values, "values");
  STD_TORCH_CHECK(values.dim() == 1, "values: expected [nnz]");
  const OnDevice device(values);
  const Tensor even = on_sixteen(values);
  BitmapJob job{};
  job.weight = bitmap_weight(even.const_data_ptr(), even.numel(), bits, starts, shape, values);
  const int64_t n = job.weight.n, k = job.weight.k;
  check_operands(x, values, bias, n, k);
  job.epilogue = epilogue_of(activation);
  STD_TORCH_CHECK(
      job.epilogue != Epilogue::unknown, "activation: expected none, gelu, gelu_tanh, relu or tanh, got ", activation);
  STD_TORCH_CHECK(n > 0 && k > 0, "shape: expected at least a row and a column");
  job.m = x.numel() / k;
  if (job.m > kFewRows) {
    Tensor dense = empty_like(values, shape, values.scalar_type());
    write_dense(job.weight, static_cast<uint16_t*>(dense.mutable_data_ptr()), device.stream());
    return dense_product(x, dense, bias, job.epilogue);
  }
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  Tensor y = empty_like(values, sizes, values.scalar_type());
  if (job.m == 0) return y;
  job.plan = bitmap_plan(n, k, job.m, device.attribute(cudaDevAttrMultiProcessorCount));
  const Tensor partial =
      empty_like(values, {job.plan.splits > 1 ? job.plan.splits * job.m * n : 0}, ScalarType::Float);
  job.partial = job.plan.splits > 1 ? static_cast<float*>(partial.mutable_data_ptr()) : nullptr;
  job.x = static_cast<const uint16_t*>(x.const_data_ptr());
  job.bias = bias ? static_cast<const uint16_t*>(bias->const_data_ptr()) : nullptr;
  job.y = static_cast<uint16_t*>(y.mutable_data_ptr());
  job.wide = k % kUnit == 0 && aligned(job.x);
  if (values.scalar_type() == ScalarType::Half) {
    launch_groups<Float::f16>(job, device.stream());
  } else {
    launch_groups<Float::bf16>(job, device.stream());
  }
  return y;
}

}  // namespace
}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CUDA, m) {
  m.impl("bitmap_linear", TORCH_BOX(&sparsebert::bitmap_linear));
}
