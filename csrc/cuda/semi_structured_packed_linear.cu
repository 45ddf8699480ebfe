// A linear layer over a packed 2:4 weight with many rows of x, on Hopper's sparse matrix units (two_four.h).
//
// One warp fetches, two warpgroups multiply. Of what blocks of a cluster have in common each fetches a share for all:
// the second-level cache is read that many times less. Two blocks share a multiprocessor: while one takes its sums
// through the activation to y the other keeps the matrix units busy.

#include <algorithm>
#include <string>

#include "hopper.cuh"
#include "launch.cuh"
#include "two_four.h"

namespace sparsebert {
namespace {

constexpr int kConsumers = static_cast<int>(TwoFour::kGroups * TwoFour::kGroupThreads);
constexpr int kThreads = kConsumers + 32;
constexpr int64_t kBarrierBytes = 2 * 8 * TwoFour::kStages;
// Where the swizzle begins is not where shared memory does.
constexpr int64_t kSharedBytes = 1024 + TwoFour::kStages * TwoFour::kStageBytes + kBarrierBytes;

#if SB_HOPPER

// Addresses in shared memory.
struct Pipeline {
  uint32_t stages;
  uint32_t barriers;

  __device__ uint32_t stage(int64_t step) const {
    return stages + static_cast<uint32_t>(step % TwoFour::kStages * TwoFour::kStageBytes);
  }
  // Ended once a step's operands have come; once all who read them in this cluster have left them.
  __device__ uint32_t full(int64_t step) const {
    return barriers + static_cast<uint32_t>(8 * (step % TwoFour::kStages));
  }
  __device__ uint32_t free(int64_t step) const { return full(step) + static_cast<uint32_t>(8 * TwoFour::kStages); }
  __device__ static uint32_t parity(int64_t step) { return static_cast<uint32_t>(step / TwoFour::kStages % 2); }
};

// Asked for anew where they are needed: what follows from them would take registers from the sums meanwhile.
__device__ int64_t thread_number() {
  uint32_t thread = 0;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return static_cast<int64_t>(thread);
}
__device__ TwoFourTile tile_of(const TwoFourJob& job) {
  uint32_t block = 0;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return {job, static_cast<int64_t>(block)};
}

// One thread of each block.
__device__ void fetch(const Pipeline& pipe, const TwoFourJob& job, const TwoFourTile& tile, const CUtensorMap& x) {
  const auto same_rows = static_cast<uint16_t>(tile.same_rows(job));
  const auto same_tokens = static_cast<uint16_t>(tile.same_tokens(job));
  for (int64_t step = 0; step < job.shape.steps(); ++step) {
    const TwoFourShare share(job, tile, step);
    // In the first round every stage is free.
    hopper::wait(pipe.free(step), pipe.parity(step) ^ 1u);
    const uint32_t stage = pipe.stage(step), full = pipe.full(step);
    hopper::expect(full, static_cast<uint32_t>(TwoFour::kStageBytes));
    hopper::copy(
        stage + static_cast<uint32_t>(share.bytes_at), share.from, static_cast<uint32_t>(share.bytes), full,
        same_rows);
    hopper::copy_box(
        stage + static_cast<uint32_t>(share.tokens_at), x, static_cast<int32_t>(step * TwoFour::kCols),
        static_cast<int32_t>(share.token), full, same_tokens);
  }
}

template <Float kType>
__device__ void multiply(const Pipeline& pipe, const TwoFourJob& job, const uint8_t* stages, float (&sum)[64]) {
  const int64_t group = threadIdx.x / TwoFour::kGroupThreads, thread = threadIdx.x % TwoFour::kGroupThreads;
  const uint8_t* const positions = stages + two_four_meta_at(group, thread);
  // A thread for each block whose copies come here tells its fetching warp. That one warp's products are done means
  // that all four have begun them, with their positions in registers.
  const bool tells = thread < TwoFourTile::partners(job);
  const auto partner = static_cast<uint32_t>(tells ? tile_of(job).partner(job, thread) : 0);
  const auto leave = [&](int64_t step) {
    if (tells) hopper::arrive_at(pipe.free(step), partner);
  };
#pragma unroll
  for (int i = 0; i < 64; ++i) sum[i] = 0.0f;
  const auto take = [&](int64_t step) {
    hopper::wait(pipe.full(step), pipe.parity(step));
    const uint32_t stage = pipe.stage(step);
    const uint32_t word =
        *reinterpret_cast<const uint32_t*>(positions + step % TwoFour::kStages * TwoFour::kStageBytes);
    hopper::products_begin();
    hopper::sparse_product<kType, 0>(sum, two_four_weight(stage, group, 0), two_four_tokens(stage, 0), word);
    hopper::sparse_product<kType, 1>(sum, two_four_weight(stage, group, 1), two_four_tokens(stage, 1), word);
    hopper::products_commit();
    hopper::products_wait<1>(sum);
    if (step > 0) leave(step - 1);
    return word;
  };
  // Two steps to a turn: a step's positions stay in their register until its products are done.
  uint32_t odd = 0;
  for (int64_t step = 0; step < job.shape.steps(); step += 2) {
    const uint32_t even = take(step);
    hopper::hold(odd);
    if (step + 1 == job.shape.steps()) break;
    odd = take(step + 1);
    hopper::hold(even);
  }
  hopper::products_wait<0>(sum);
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
__device__ void consumers_meet() { asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory"); }

#endif  // SB_HOPPER

template <Float kType, Epilogue kEpilogue>
__global__ void __launch_bounds__(kThreads, 2)
    linear_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ TwoFourJob job) {
#if SB_HOPPER
  extern __shared__ uint8_t memory[];
  const uint32_t begin = hopper::shared_address(memory), skip = (1024u - begin % 1024u) % 1024u;
  uint8_t* const stages = memory + skip;
  const Pipeline pipe{begin + skip, begin + skip + static_cast<uint32_t>(TwoFour::kStages * TwoFour::kStageBytes)};
  if (threadIdx.x == 0) {
    for (int64_t i = 0; i < TwoFour::kStages; ++i) {
      hopper::barrier_init(pipe.full(i), 1);
      hopper::barrier_init(pipe.free(i), static_cast<uint32_t>(TwoFour::kGroups * TwoFourTile::partners(job)));
    }
    hopper::barriers_made();
  }
  __syncwarp();
  hopper::cluster_meets();
  if (threadIdx.x >= kConsumers) {
    if (threadIdx.x == kConsumers) fetch(pipe, job, tile_of(job), x);
    __syncwarp();
  } else {
    TwoFourLane own;
    multiply<kType>(pipe, job, stages, own.sum);
    // The stages are free: all that was to come has come, and both warpgroups have read it.
    consumers_meet();
    DeviceWarp warp{own, pipe.stages};
    two_four_publish<kEpilogue, kType>(warp, job, tile_of(job).row_tile);
    consumers_meet();
    two_four_store(job, tile_of(job), stages, thread_number(), kConsumers);
  }
  // No block ends while another may still tell it of a stage.
  hopper::cluster_meets();
#endif
}

// x [m, K] in boxes of 64 columns and a block's share of tokens. Beyond its edges there is 0.
CUtensorMap map_of(const TwoFourJob& job, const void* x, bool half) {
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
        found != nullptr && result == cudaDriverEntryPointSuccess,
        "semi_structured_packed_linear: the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(job.shape.k), static_cast<cuuint64_t>(job.m)};
  const cuuint64_t pitch[] = {static_cast<cuuint64_t>(2 * job.shape.k)};
  const cuuint32_t box[] = {
      static_cast<cuuint32_t>(TwoFour::kCols), static_cast<cuuint32_t>(TwoFour::kTokens / job.down)};
  const cuuint32_t every[] = {1, 1};
  const CUresult made = encode(
      &map, half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(x), sizes,
      pitch, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(made == CUDA_SUCCESS, "semi_structured_packed_linear: no tensor map for x (error ", made, ")");
  return map;
}

template <Float kType, Epilogue kEpilogue>
void launch(const CUtensorMap& x, const TwoFourJob& job, cudaStream_t stream) {
  const auto kernel = linear_kernel<kType, kEpilogue>;
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kSharedBytes)));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(job.cluster()), 1, 1};
  cudaLaunchConfig_t how{};
  how.gridDim = dim3(static_cast<unsigned>(job.blocks()));
  how.blockDim = dim3(kThreads);
  how.dynamicSmemBytes = kSharedBytes;
  how.stream = stream;
  how.attrs = &cluster;
  how.numAttrs = 1;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&how, kernel, x, job));
}

template <Float kType>
void launch_with(const CUtensorMap& x, const TwoFourJob& job, Epilogue epilogue, cudaStream_t stream) {
  switch (epilogue) {
    case Epilogue::gelu: return launch<kType, Epilogue::gelu>(x, job, stream);
    case Epilogue::gelu_tanh: return launch<kType, Epilogue::gelu_tanh>(x, job, stream);
    case Epilogue::relu: return launch<kType, Epilogue::relu>(x, job, stream);
    case Epilogue::tanh: return launch<kType, Epilogue::tanh>(x, job, stream);
    default: return launch<kType, Epilogue::none>(x, job, stream);
  }
}

TwoFourShape shape_of(const std::vector<int64_t>& shape) {
  constexpr int64_t kMost = int64_t{1} << 30;
  STD_TORCH_CHECK(
      shape.size() == 2 && shape[0] > 0 && shape[1] > 0 && shape[0] < kMost && shape[1] < kMost && shape[0] % 8 == 0 &&
          shape[1] % 8 == 0,
      "shape: expected [N, K], both multiples of 8 below 2^30");
  return {shape[0], shape[1]};
}

Tensor semi_structured_packed_linear(
    Tensor x, Tensor packed, std::optional<Tensor> bias, std::vector<int64_t> shape, std::string activation) {
  check_cuda(x, x, "x");
  check_cuda(packed, x, "packed");
  TwoFourJob job{};
  job.shape = shape_of(shape);
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "x: expected bfloat16 or float16");
  STD_TORCH_CHECK(
      x.dim() > 0 && x.size(x.dim() - 1) == job.shape.k, "x: expected [..., ", job.shape.k, "]");
  STD_TORCH_CHECK(
      packed.scalar_type() == ScalarType::Byte && packed.dim() == 3 && packed.size(0) == job.shape.row_tiles() &&
          packed.size(1) == job.shape.steps() && packed.size(2) == TwoFour::kPackedBytes,
      "packed: expected uint8 [", job.shape.row_tiles(), ", ", job.shape.steps(), ", ", TwoFour::kPackedBytes, "]");
  const Epilogue epilogue = epilogue_of(activation);
  STD_TORCH_CHECK(
      epilogue != Epilogue::unknown, "activation: expected none, gelu, gelu_tanh, relu or tanh, got ", activation);
  if (bias) {
    check_cuda(*bias, x, "bias");
    STD_TORCH_CHECK(
        bias->dim() == 1 && bias->size(0) == job.shape.n && bias->scalar_type() == dtype, "bias: expected [",
        job.shape.n, "] in the dtype of x");
  }
  const OnDevice device(x);
  const int major = device.attribute(cudaDevAttrComputeCapabilityMajor);
  STD_TORCH_CHECK(
      major == 9, "semi_structured_packed_linear: runs on compute capability 9.0 (H100, H200) alone, this GPU has ",
      major, ".", device.attribute(cudaDevAttrComputeCapabilityMinor));
  job.m = x.numel() / job.shape.k;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = job.shape.n;
  Tensor y = empty_like(x, sizes, dtype);
  if (job.m == 0) return y;
  job.choose_cluster();
  STD_TORCH_CHECK(
      job.m < (int64_t{1} << 31) - 8 * TwoFour::kTokens && job.blocks() < int64_t{1} << 31, "x: too many rows, ",
      job.m);
  const Tensor even = on_sixteen(x), weight = on_sixteen(packed);
  job.packed = static_cast<const uint8_t*>(weight.const_data_ptr());
  job.bias = bias ? static_cast<const uint16_t*>(bias->const_data_ptr()) : nullptr;
  job.y = static_cast<uint16_t*>(y.mutable_data_ptr());
  const bool half = dtype == ScalarType::Half;
  const CUtensorMap map = map_of(job, even.const_data_ptr(), half);
  if (half) launch_with<Float::f16>(map, job, epilogue, device.stream());
  else launch_with<Float::bf16>(map, job, epilogue, device.stream());
  return y;
}

}  // namespace
}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CUDA, m) {
  m.impl("semi_structured_packed_linear", TORCH_BOX(&sparsebert::semi_structured_packed_linear));
}
