// A linear layer over blocks of 64 x 64 or 128 x 128 with many rows of x, by clusters of Hopper's multiprocessors (block_cluster.h).
//
// As in semi_structured_packed_linear.cu one warp fetches and two warpgroups multiply, and two blocks share a
// multiprocessor.

#include <string>

#include "block_cluster.h"
#include "clusters.cuh"

namespace sparsebert {
namespace {

// How shared memory is shared out.
constexpr int64_t kTable = BlockCluster::kStages * BlockCluster::kStageBytes;
constexpr int64_t kBarriers = kTable + BlockTable::kBytes;
// Where the swizzle begins is not where shared memory does.
constexpr int64_t kBytes = 1024 + kBarriers + 2 * 8 * BlockCluster::kStages;

#if SB_HOPPER

using Stages = Pipeline<BlockCluster::kStages, BlockCluster::kStageBytes, kBarriers>;

// One thread of each block.
__device__ void fetch(
    const Stages& pipe, const BlockClusterJob& job, const BlockTable& table, const TwoFourTile& tile,
    const CUtensorMap& x, const CUtensorMap& weight) {
  const auto same_rows = static_cast<uint16_t>(tile.same_rows(job.layer));
  const auto same_tokens = static_cast<uint16_t>(tile.same_tokens(job.layer));
  const int64_t share = BlockCluster::kCell / job.layer.across, first = tile.token_rank * share;
  int64_t turn = 0;
  for (int64_t step = 0; step < table.steps; ++step) {
    if (table.is_passed(step)) continue;
    // In the first round every stage is free.
    hopper::wait(pipe.free(turn), pipe.parity(turn) ^ 1u);
    const uint32_t stage = pipe.stage(turn), full = pipe.full(turn);
    int64_t bytes = TwoFour::kTokenBytes;
    for (int64_t group = 0; group < TwoFour::kGroups; ++group) {
      if (table.block(tile, group, step) >= 0) bytes += BlockCluster::kCellBytes;
    }
    hopper::expect(full, static_cast<uint32_t>(bytes));
    for (int64_t group = 0; group < TwoFour::kGroups; ++group) {
      const int64_t block = table.block(tile, group, step);
      if (block < 0) continue;
      hopper::copy_box(
          stage + block_share_at(group, first), weight, static_cast<int32_t>(job.col_of(step)),
          static_cast<int32_t>(job.row_of(block, group) + first), full, same_rows);
    }
    for (int64_t box = tile.row_rank; box < BlockCluster::kBoxes; box += job.layer.down) {
      const int64_t token = box * BlockCluster::kBoxTokens;
      hopper::copy_box(
          stage + static_cast<uint32_t>(token * TwoFour::kTokenPitch), x,
          static_cast<int32_t>(step * BlockCluster::kCell), static_cast<int32_t>(tile.token + token), full,
          same_tokens);
    }
    ++turn;
  }
}

template <Float kType>
__device__ void multiply(const Stages& pipe, const BlockClusterJob& job, const BlockTable& table, float (&sum)[64]) {
  const int64_t group = threadIdx.x / TwoFour::kGroupThreads, thread = threadIdx.x % TwoFour::kGroupThreads;
  // A thread for each block whose copies come here tells its fetching warp. That one warp's products are done means
  // that all four have.
  const bool tells = thread < TwoFourTile::partners(job.layer);
  const auto partner = static_cast<uint32_t>(tells ? tile_of(job.layer).partner(job.layer, thread) : 0);
  const auto leave = [&](int64_t turn) {
    if (tells) hopper::arrive_at(pipe.free(turn), partner);
  };
  const int32_t* const own = table.entries + (tile_of(job.layer).row_rank * TwoFour::kGroups + group) * table.steps;
#pragma unroll
  for (int i = 0; i < 64; ++i) sum[i] = 0.0f;
  int64_t turn = 0;
  for (int64_t step = 0; step < table.steps; ++step) {
    if (table.is_passed(step)) continue;
    hopper::wait(pipe.full(turn), pipe.parity(turn));
    const uint32_t stage = pipe.stage(turn);
    if (own[step] >= 0) {
      hopper::products_begin();
#pragma unroll
      for (int64_t product = 0; product < BlockCluster::kProducts; ++product) {
        hopper::dense_product<kType>(sum, block_weight(stage, group, product), block_tokens(stage, product));
      }
      hopper::products_commit();
      hopper::products_wait<0>(sum);
    }
    leave(turn);
    ++turn;
  }
}

#endif  // SB_HOPPER

template <Float kType, Epilogue kEpilogue>
__global__ void __launch_bounds__(kThreads, 2) linear_kernel(
    const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap weight,
    const __grid_constant__ BlockClusterJob job) {
#if SB_HOPPER
  extern __shared__ uint8_t memory[];
  const uint32_t begin = hopper::shared_address(memory), skip = (1024u - begin % 1024u) % 1024u;
  uint8_t* const stages = memory + skip;
  const Stages pipe{begin + skip};
  BlockTable table(job, reinterpret_cast<int32_t*>(stages + kTable));
  if (threadIdx.x == 0) pipe.begin(job.layer);
  table.clear(threadIdx.x, kThreads);
  __syncthreads();
  table.fill(job, tile_of(job.layer), threadIdx.x, kThreads);
  __syncthreads();
  table.unite(threadIdx.x, kThreads);
  __syncthreads();
  hopper::cluster_meets();
  if (threadIdx.x >= kConsumers) {
    if (threadIdx.x == kConsumers) fetch(pipe, job, table, tile_of(job.layer), x, weight);
    __syncwarp();
  } else {
    TwoFourLane own;
    multiply<kType>(pipe, job, table, own.sum);
    finish<kType, kEpilogue>(job.layer, own, stages, pipe.stages);
  }
  // No block ends while another may still tell it of a stage.
  hopper::cluster_meets();
#endif
}

template <Float kType>
void launch(
    const CUtensorMap& x, const CUtensorMap& weight, const BlockClusterJob& job, Epilogue epilogue,
    cudaStream_t stream) {
  with_epilogue(epilogue, [&]<Epilogue kEpilogue>() {
    launch_clusters(linear_kernel<kType, kEpilogue>, job.layer, kBytes, stream, x, weight, job);
  });
}

Tensor block_cluster_linear(
    Tensor x, Tensor values, Tensor columns, Tensor row_starts, std::optional<Tensor> bias, std::vector<int64_t> shape,
    std::string activation) {
  const int64_t size = values.dim() == 3 ? values.size(1) : 0;
  STD_TORCH_CHECK(
      (size == 64 || size == 128) && values.size(2) == size && values.scalar_type() == x.scalar_type(),
      "values: expected [B, 64, 64] or [B, 128, 128] in the dtype of x");
  BlockClusterJob job{};
  job.size = size;
  job.layer.shape = shape_of(shape, size);
  Tensor y = layer_of(x, bias, activation, job.layer);
  check_cuda(values, x, "values");
  check_cuda(columns, x, "columns");
  check_cuda(row_starts, x, "row_starts");
  job.blocks = values.size(0);
  STD_TORCH_CHECK(
      columns.scalar_type() == ScalarType::Int && columns.dim() == 1 && columns.size(0) == job.blocks,
      "columns: expected int32 [", job.blocks, "]");
  STD_TORCH_CHECK(
      row_starts.scalar_type() == ScalarType::Int && row_starts.dim() == 1 &&
          row_starts.size(0) == job.block_rows() + 1,
      "row_starts: expected int32 [", job.block_rows() + 1, "]");
  STD_TORCH_CHECK(
      job.steps() <= BlockCluster::kMostSteps, "shape: expected at most ",
      BlockCluster::kCell * BlockCluster::kMostSteps, " columns, got ", job.layer.shape.k);
  STD_TORCH_CHECK(job.blocks * size < int64_t{1} << 31, "values: too many blocks, ", job.blocks);
  const OnDevice device(x);
  check_hopper(device, "block_cluster_linear");
  if (job.layer.m == 0) return y;
  job.choose_cluster();
  check_rows(job.layer);
  const Tensor even = on_sixteen(x), weight = on_sixteen(values);
  job.columns = static_cast<const int32_t*>(columns.const_data_ptr());
  job.row_starts = static_cast<const int32_t*>(row_starts.const_data_ptr());
  const bool half = x.scalar_type() == ScalarType::Half;
  const char* const op = "block_cluster_linear";
  const CUtensorMap boxes =
      boxes_of(op, even.const_data_ptr(), job.layer.m, job.layer.shape.k, BlockCluster::kBoxTokens, half);
  // Without a block there is nothing to fetch, yet a map must be of something.
  const bool none = job.blocks == 0;
  const CUtensorMap blocks = boxes_of(
      op, none ? even.const_data_ptr() : weight.const_data_ptr(), none ? 1 : job.blocks * size, size,
      BlockCluster::kCell / job.layer.across, half);
  if (half) launch<Float::f16>(boxes, blocks, job, epilogue_of(activation), device.stream());
  else launch<Float::bf16>(boxes, blocks, job, epilogue_of(activation), device.stream());
  return y;
}

}  // namespace
}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CUDA, m) {
  m.impl("block_cluster_linear", TORCH_BOX(&sparsebert::block_cluster_linear));
}
