// What the layers that run in clusters share (two_four.h): one warp fetches stages, two warpgroups multiply them.

#pragma once

#include "hopper.cuh"
#include "launch.cuh"
#include "two_four.h"

namespace sparsebert {

constexpr int kConsumers = static_cast<int>(TwoFour::kGroups * TwoFour::kGroupThreads);
constexpr int kThreads = kConsumers + 32;

#if SB_HOPPER

// Addresses in shared memory: so many stages of so many bytes, and the barriers `kBarriersAt` bytes after the first.
template <int64_t kCount, int64_t kStageBytes, int64_t kBarriersAt>
struct Pipeline {
  static constexpr int64_t kStages = kCount;

  uint32_t stages;

  __device__ uint32_t stage(int64_t step) const {
    return stages + static_cast<uint32_t>(step % kStages * kStageBytes);
  }
  // Ended once a step's operands have come; once all who read them in this cluster have left them.
  __device__ uint32_t full(int64_t step) const {
    return stages + static_cast<uint32_t>(kBarriersAt + 8 * (step % kStages));
  }
  __device__ uint32_t free(int64_t step) const { return full(step) + static_cast<uint32_t>(8 * kStages); }
  __device__ static uint32_t parity(int64_t step) { return static_cast<uint32_t>(step / kStages % 2); }

  // By one thread, before the cluster meets.
  __device__ void begin(const TwoFourJob& job) const {
    for (int64_t i = 0; i < kStages; ++i) {
      hopper::barrier_init(full(i), 1);
      hopper::barrier_init(free(i), static_cast<uint32_t>(TwoFour::kGroups * TwoFourTile::partners(job)));
    }
    hopper::barriers_made();
  }
};

// Asked for anew where they are needed: what follows from them would take registers from the sums meanwhile.
__device__ inline int64_t thread_number() {
  uint32_t thread = 0;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return static_cast<int64_t>(thread);
}
__device__ inline TwoFourTile tile_of(const TwoFourJob& job) {
  uint32_t block = 0;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return {job, static_cast<int64_t>(block)};
}

// A warp, as two_four_publish sees it.
struct DeviceWarp {
  TwoFourLane& own;
  uint32_t rows;

  __device__ int64_t number() const { return thread_number() / 32; }
  template <typename F>
  __device__ void lanes(F&& step) {
    step(thread_number() % 32, own);
  }
  __device__ void store_turned() {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(rows + own.to),
                 "r"(own.words[0]), "r"(own.words[1]), "r"(own.words[2]), "r"(own.words[3])
                 : "memory");
  }
};

// Of the threads that multiply.
__device__ inline void consumers_meet() { asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory"); }

// From the sums to y, through the stages' place.
template <Float kType, Epilogue kEpilogue>
__device__ void finish(const TwoFourJob& job, TwoFourLane& own, uint8_t* stages, uint32_t at) {
  // The stages are free: all that was to come has come, and both warpgroups have read it.
  consumers_meet();
  DeviceWarp warp{own, at};
  two_four_publish<kEpilogue, kType>(warp, job, tile_of(job).row_tile);
  consumers_meet();
  two_four_store(job, tile_of(job), stages, thread_number(), kConsumers);
}

#endif  // SB_HOPPER

// A matrix of 16-bit floats in boxes of 64 columns and `box_rows` rows, swizzled; 0 beyond its edges. `op` is told of.
inline CUtensorMap boxes_of(
    const char* op, const void* matrix, int64_t rows, int64_t cols, int64_t box_rows, bool half) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    STD_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
#else
    STD_CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result));
#endif
    STD_TORCH_CHECK(
        found != nullptr && result == cudaDriverEntryPointSuccess, "the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[] = {static_cast<cuuint64_t>(2 * cols)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(TwoFour::kCols), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t every[] = {1, 1};
  const CUresult made = encode(
      &map, half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(matrix),
      sizes, pitch, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(made == CUDA_SUCCESS, op, ": no tensor map for a matrix (error ", made, ")");
  return map;
}

// Launches a kernel of such blocks, in clusters, with so many bytes of shared memory.
template <typename Kernel, typename... Args>
void launch_clusters(Kernel kernel, const TwoFourJob& job, int64_t bytes, cudaStream_t stream, const Args&... args) {
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(job.cluster()), 1, 1};
  cudaLaunchConfig_t how{};
  how.gridDim = dim3(static_cast<unsigned>(job.blocks()));
  how.blockDim = dim3(kThreads);
  how.dynamicSmemBytes = static_cast<size_t>(bytes);
  how.stream = stream;
  how.attrs = &cluster;
  how.numAttrs = 1;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&how, kernel, args...));
}

// Calls `run` with the epilogue as a constant.
template <typename F>
void with_epilogue(Epilogue epilogue, F&& run) {
  switch (epilogue) {
    case Epilogue::gelu: return run.template operator()<Epilogue::gelu>();
    case Epilogue::gelu_tanh: return run.template operator()<Epilogue::gelu_tanh>();
    case Epilogue::relu: return run.template operator()<Epilogue::relu>();
    case Epilogue::tanh: return run.template operator()<Epilogue::tanh>();
    default: return run.template operator()<Epilogue::none>();
  }
}

inline TwoFourShape shape_of(const std::vector<int64_t>& shape, int64_t unit) {
  constexpr int64_t kMost = int64_t{1} << 30;
  STD_TORCH_CHECK(
      shape.size() == 2 && shape[0] > 0 && shape[1] > 0 && shape[0] < kMost && shape[1] < kMost &&
          shape[0] % unit == 0 && shape[1] % unit == 0,
      "shape: expected [N, K], both multiples of ", unit, " below 2^30");
  return {shape[0], shape[1]};
}

inline void check_hopper(const OnDevice& device, const char* op) {
  const int major = device.attribute(cudaDevAttrComputeCapabilityMajor);
  STD_TORCH_CHECK(
      major == 9, op, ": runs on compute capability 9.0 (H100, H200) alone, this GPU has ", major, ".",
      device.attribute(cudaDevAttrComputeCapabilityMinor));
}

// Checks x, bias and activation of a layer, and returns y, empty; what of them the job needs is in it, but for the
// cluster and for x.
inline Tensor layer_of(
    const Tensor& x, const std::optional<Tensor>& bias, const std::string& activation, TwoFourJob& job) {
  check_cuda(x, x, "x");
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "x: expected bfloat16 or float16");
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) == job.shape.k, "x: expected [..., ", job.shape.k, "]");
  STD_TORCH_CHECK(
      epilogue_of(activation) != Epilogue::unknown,
      "activation: expected none, gelu, gelu_tanh, relu or tanh, got ", activation);
  if (bias) {
    check_cuda(*bias, x, "bias");
    STD_TORCH_CHECK(
        bias->dim() == 1 && bias->size(0) == job.shape.n && bias->scalar_type() == dtype, "bias: expected [",
        job.shape.n, "] in the dtype of x");
  }
  job.m = x.numel() / job.shape.k;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = job.shape.n;
  Tensor y = empty_like(x, sizes, dtype);
  job.bias = bias ? static_cast<const uint16_t*>(bias->const_data_ptr()) : nullptr;
  job.y = static_cast<uint16_t*>(y.mutable_data_ptr());
  return y;
}

inline void check_rows(const TwoFourJob& job) {
  STD_TORCH_CHECK(
      job.m < (int64_t{1} << 31) - 8 * TwoFour::kTokens && job.blocks() < int64_t{1} << 31, "x: too many rows, ",
      job.m);
}

}  // namespace sparsebert
