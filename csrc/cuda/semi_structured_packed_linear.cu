// A linear layer over a packed 2:4 weight with many rows of x, on Hopper's sparse matrix units (two_four.h).
//
// One warp fetches, two warpgroups multiply. Of what blocks of a cluster have in common each fetches a share for all:
// the second-level cache is read that many times less. Two blocks share a multiprocessor: while one takes its sums
// through the activation to y the other keeps the matrix units busy.

#include <algorithm>
#include <string>

#include "clusters.cuh"

namespace sparsebert {
namespace {

// How shared memory is shared out, with a residue or without one.
template <bool kResidue>
struct Memory {
  static constexpr int64_t kStages = kResidue ? TwoFour::kStagesBesideResidue : TwoFour::kStages;
  static constexpr int64_t kSlots = kStages * TwoFour::kStageBytes;
  static constexpr int64_t kBarriers = kSlots + (kResidue ? TwoFour::kGroups * TwoFour::kSlotBytes : 0);
  // Where the swizzle begins is not where shared memory does.
  static constexpr int64_t kBytes = 1024 + kBarriers + 2 * 8 * kStages;
};

#if SB_HOPPER

template <bool kResidue>
using Stages = Pipeline<Memory<kResidue>::kStages, TwoFour::kStageBytes, Memory<kResidue>::kBarriers>;

// One thread of each block.
template <bool kResidue>
__device__ void fetch(const Stages<kResidue>& pipe, const TwoFourJob& job, const TwoFourTile& tile, const CUtensorMap& x) {
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

// Of a warpgroup.
__device__ void group_meets() {
  if (threadIdx.x < TwoFour::kGroupThreads) asm volatile("bar.sync 2, %0;" ::"n"(TwoFour::kGroupThreads) : "memory");
  else asm volatile("bar.sync 3, %0;" ::"n"(TwoFour::kGroupThreads) : "memory");
}

// The columns of x that a warpgroup's rows have residue in, a token to a thread.
template <Float kType>
struct Gather {
  const TwoFourJob& job;
  uint32_t slots;
  uint32_t group;  // of 64 rows of the weight

  __device__ static int64_t thread() { return threadIdx.x % TwoFour::kGroupThreads; }

  // What no column is gathered to is multiplied by zeros, and must be a number.
  __device__ void begin() const {
    for (int64_t slot = 0; slot < TwoFour::kSlots; slot += TwoFour::kUnit) {
      hopper::store_zeros(slots + two_four_slot_at(slot, thread()));
    }
  }
  __device__ void take(TwoFourSpan span, uint32_t stage) const {
    const uint8_t* const columns = job.residue.slots(group, span);
#pragma unroll 1
    for (uint32_t slot = span.first(); slot < span.end(); ++slot) {
      const uint16_t entry = hopper::load_half(stage + two_four_entry_at(thread(), columns[slot]));
      hopper::store_half(slots + two_four_slot_at(slot, thread()), entry);
    }
  }
  __device__ void multiply(TwoFourSpan span, float (&sum)[64]) const {
    hopper::products_wait<0>(sum);
    hopper::written_for_products();
    group_meets();
#pragma unroll 1
    for (int64_t product = 0; product < job.residue.products; ++product) {
      const Words own = *job.residue.operand(group, span, product, thread());
      hopper::products_begin();
      hopper::dense_product<kType>(sum, own, two_four_slots(slots, product));
      hopper::products_commit();
      hopper::products_wait<0>(sum);
    }
    // No slot is written anew before all four warps' products are done.
    group_meets();
  }
};

template <Float kType, bool kResidue>
__device__ void multiply(const Stages<kResidue>& pipe, const TwoFourJob& job, float (&sum)[64]) {
  const int64_t group = threadIdx.x / TwoFour::kGroupThreads, thread = threadIdx.x % TwoFour::kGroupThreads;
  const int64_t steps = job.shape.steps();
  // A thread for each block whose copies come here tells its fetching warp. That one warp's products are done means
  // that all four have begun them, with their positions in registers and their columns gathered.
  const bool tells = thread < TwoFourTile::partners(job);
  const auto partner = static_cast<uint32_t>(tells ? tile_of(job).partner(job, thread) : 0);
  const auto leave = [&](int64_t step) {
    if (tells) hopper::arrive_at(pipe.free(step), partner);
  };
  const Gather<kType> gather{
      job, pipe.stages + static_cast<uint32_t>(Memory<kResidue>::kSlots + group * TwoFour::kSlotBytes),
      static_cast<uint32_t>(kResidue ? tile_of(job).row_tile * TwoFour::kGroups + group : 0)};
  if constexpr (kResidue) gather.begin();
#pragma unroll
  for (int i = 0; i < 64; ++i) sum[i] = 0.0f;
  const auto take = [&](int64_t step) {
    hopper::wait(pipe.full(step), pipe.parity(step));
    const uint32_t stage = pipe.stage(step);
    TwoFourSpan span{};
    if constexpr (kResidue) {
      span = job.residue.span(gather.group, steps, step);
      gather.take(span, stage);
    }
    const uint32_t word = hopper::load_word(stage + static_cast<uint32_t>(two_four_meta_at(group, thread)));
    hopper::products_begin();
    hopper::sparse_product<kType, 0>(sum, two_four_weight(stage, group, 0), two_four_tokens(stage, 0), word);
    hopper::sparse_product<kType, 1>(sum, two_four_weight(stage, group, 1), two_four_tokens(stage, 1), word);
    hopper::products_commit();
    if constexpr (kResidue) {
      // No registers are left for a step's positions while the next one's products begin.
      hopper::products_wait<0>(sum);
      leave(step);
      if (span.ends_chunk()) gather.multiply(span, sum);
    } else {
      hopper::products_wait<1>(sum);
      if (step > 0) leave(step - 1);
    }
    return word;
  };
  if constexpr (kResidue) {
    for (int64_t step = 0; step < steps; ++step) take(step);
    return;
  }
  // Two steps to a turn: a step's positions stay in their register until its products are done.
  uint32_t odd = 0;
  for (int64_t step = 0; step < steps; step += 2) {
    const uint32_t even = take(step);
    hopper::hold(odd);
    if (step + 1 == steps) break;
    odd = take(step + 1);
    hopper::hold(even);
  }
  hopper::products_wait<0>(sum);
}

#endif  // SB_HOPPER

template <Float kType, Epilogue kEpilogue, bool kResidue>
__global__ void __launch_bounds__(kThreads, 2)
    linear_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ TwoFourJob job) {
#if SB_HOPPER
  extern __shared__ uint8_t memory[];
  const uint32_t begin = hopper::shared_address(memory), skip = (1024u - begin % 1024u) % 1024u;
  uint8_t* const stages = memory + skip;
  const Stages<kResidue> pipe{begin + skip};
  if (threadIdx.x == 0) pipe.begin(job);
  __syncwarp();
  hopper::cluster_meets();
  if (threadIdx.x >= kConsumers) {
    if (threadIdx.x == kConsumers) fetch<kResidue>(pipe, job, tile_of(job), x);
    __syncwarp();
  } else {
    TwoFourLane own;
    multiply<kType, kResidue>(pipe, job, own.sum);
    finish<kType, kEpilogue>(job, own, stages, pipe.stages);
  }
  // No block ends while another may still tell it of a stage.
  hopper::cluster_meets();
#endif
}

template <Float kType>
void launch(const CUtensorMap& x, const TwoFourJob& job, Epilogue epilogue, cudaStream_t stream) {
  with_epilogue(epilogue, [&]<Epilogue kEpilogue>() {
    if (job.residue.values == nullptr) {
      launch_clusters(linear_kernel<kType, kEpilogue, false>, job, Memory<false>::kBytes, stream, x, job);
    } else {
      launch_clusters(linear_kernel<kType, kEpilogue, true>, job, Memory<true>::kBytes, stream, x, job);
    }
  });
}

// What checked tensors hold; `values` must outlive it.
TwoFourResidue residue_of(const std::vector<Tensor>& parts, const TwoFourShape& shape, const Tensor& x) {
  TwoFourResidue residue{};
  if (parts.empty()) return residue;
  STD_TORCH_CHECK(parts.size() == 3, "residue: expected 3 tensors, got ", parts.size());
  const Tensor &spans = parts[0], &columns = parts[1], &values = parts[2];
  const int64_t groups = TwoFour::kGroups * shape.row_tiles();
  check_cuda(spans, x, "residue's spans");
  check_cuda(columns, x, "residue's columns");
  check_cuda(values, x, "residue's values");
  STD_TORCH_CHECK(
      spans.scalar_type() == ScalarType::Int && spans.dim() == 2 && spans.size(0) == groups &&
          spans.size(1) == shape.steps(),
      "residue's spans: expected int32 [", groups, ", ", shape.steps(), "]");
  STD_TORCH_CHECK(
      columns.scalar_type() == ScalarType::Byte && columns.dim() == 3 && columns.size(0) == groups &&
          columns.size(2) == TwoFour::kSlots,
      "residue's columns: expected uint8 [", groups, ", chunks, ", TwoFour::kSlots, "]");
  residue.chunks = columns.size(1);
  STD_TORCH_CHECK(
      values.scalar_type() == x.scalar_type() && values.dim() == 5 && values.size(0) == groups &&
          values.size(1) == residue.chunks && values.size(2) >= 1 &&
          values.size(2) <= TwoFour::kSlots / TwoFour::kSlotsOfProduct && values.size(3) == TwoFour::kGroupThreads &&
          values.size(4) == TwoFour::kUnit && aligned(values.const_data_ptr()),
      "residue's values: expected [", groups, ", ", residue.chunks, ", 1 to 4, 128, 8] in the dtype of x, aligned");
  residue.products = values.size(2);
  residue.spans = static_cast<const uint32_t*>(spans.const_data_ptr());
  residue.columns = static_cast<const uint8_t*>(columns.const_data_ptr());
  residue.values = static_cast<const uint16_t*>(values.const_data_ptr());
  return residue;
}

Tensor semi_structured_packed_linear(
    Tensor x, Tensor packed, std::optional<Tensor> bias, std::vector<Tensor> residue, std::vector<int64_t> shape,
    std::string activation) {
  TwoFourJob job{};
  job.shape = shape_of(shape, 8);
  Tensor y = layer_of(x, bias, activation, job);
  check_cuda(packed, x, "packed");
  STD_TORCH_CHECK(
      packed.scalar_type() == ScalarType::Byte && packed.dim() == 3 && packed.size(0) == job.shape.row_tiles() &&
          packed.size(1) == job.shape.steps() && packed.size(2) == TwoFour::kPackedBytes,
      "packed: expected uint8 [", job.shape.row_tiles(), ", ", job.shape.steps(), ", ", TwoFour::kPackedBytes, "]");
  job.residue = residue_of(residue, job.shape, x);
  const OnDevice device(x);
  check_hopper(device, "semi_structured_packed_linear");
  if (job.m == 0) return y;
  job.choose_cluster();
  check_rows(job);
  const Tensor even = on_sixteen(x), weight = on_sixteen(packed);
  job.packed = static_cast<const uint8_t*>(weight.const_data_ptr());
  const bool half = x.scalar_type() == ScalarType::Half;
  const CUtensorMap map = boxes_of(
      "semi_structured_packed_linear", even.const_data_ptr(), job.m, job.shape.k, TwoFour::kTokens / job.down, half);
  if (half) launch<Float::f16>(map, job, epilogue_of(activation), device.stream());
  else launch<Float::bf16>(map, job, epilogue_of(activation), device.stream());
  return y;
}

}  // namespace
}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CUDA, m) {
  m.impl("semi_structured_packed_linear", TORCH_BOX(&sparsebert::semi_structured_packed_linear));
}
