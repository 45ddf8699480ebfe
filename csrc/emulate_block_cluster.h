// The product of blocks by clusters (block_cluster.h) on the host, as emulate_two_four.h has the packed one.

#pragma once

#include "block_cluster.h"
#include "emulate_two_four.h"

namespace sparsebert {

// wgmma.mma_async m64n128k16 of a warpgroup, both operands in shared memory.
inline void host_block_product(HostShared& shared, TwoFourLane* lanes, uint64_t a, uint64_t b) {
  for (int64_t row = 0; row < TwoFour::kGroupRows; ++row) {
    const int64_t first = row / 16 * 32 + row % 8 * 4, high = row % 16 / 8;
    for (int64_t k = 0; k < 16; ++k) {
      const float value = from_16(Float::bf16, shared.entry(a, row, 2 * k));
      for (int64_t token = 0; token < TwoFour::kTokens; ++token) {
        float& sum = lanes[first + token % 8 / 2].sum[4 * (token / 8) + 2 * high + token % 2];
        sum += value * from_16(Float::bf16, shared.entry(b, token, 2 * k));
      }
    }
  }
}

class HostBlockCluster {
 public:
  HostBlockCluster(const BlockClusterJob& job, const uint16_t* x, const uint16_t* values, int64_t first)
      : job_(job), x_(x), values_(values), first_(first) {
    for (int64_t rank = 0; rank < job.layer.cluster(); ++rank) {
      blocks_.emplace_back(BlockCluster::kStages * BlockCluster::kStageBytes);
      memory_.emplace_back(BlockTable::kBytes / 4);
    }
    for (int64_t rank = 0; rank < job.layer.cluster(); ++rank) {
      BlockTable made = table(rank);
      for (int64_t thread = 0; thread < kThreads; ++thread) made.clear(thread, kThreads);
      for (int64_t thread = 0; thread < kThreads; ++thread) made.fill(job, tile(rank), thread, kThreads);
      for (int64_t thread = 0; thread < kThreads; ++thread) made.unite(thread, kThreads);
    }
  }

  void run(Epilogue epilogue) {
    std::vector<int64_t> steps;
    for (int64_t step = 0; step < job_.steps(); ++step) {
      for (int64_t rank = 0; rank < job_.layer.cluster(); ++rank) {
        if (table(rank).is_passed(step) != table(0).is_passed(step)) throw std::runtime_error("blocks that disagree");
      }
      if (!table(0).is_passed(step)) steps.push_back(step);
    }
    const auto count = static_cast<int64_t>(steps.size());
    for (int64_t turn = 0; turn < count && turn < BlockCluster::kStages - 1; ++turn) fetch(turn, steps[turn]);
    for (int64_t turn = 0; turn < count; ++turn) {
      const int64_t next = turn + BlockCluster::kStages - 1;
      if (next < count) fetch(next, steps[next]);
      for (int64_t rank = 0; rank < job_.layer.cluster(); ++rank) multiply(rank, turn, steps[turn]);
    }
    for (int64_t rank = 0; rank < job_.layer.cluster(); ++rank) {
      host_finish(blocks_[rank], job_.layer, tile(rank), epilogue);
    }
  }

 private:
  static constexpr int64_t kThreads = 288;

  TwoFourTile tile(int64_t rank) const { return {job_.layer, first_ + rank}; }
  BlockTable table(int64_t rank) { return {job_, memory_[rank].data()}; }
  static uint32_t stage(int64_t turn) {
    return HostShared::kBegin + static_cast<uint32_t>(turn % BlockCluster::kStages * BlockCluster::kStageBytes);
  }

  void fetch(int64_t turn, int64_t step) {
    for (int64_t rank = 0; rank < job_.layer.cluster(); ++rank) {
      const TwoFourTile own = tile(rank);
      const int64_t share = BlockCluster::kCell / job_.layer.across, from = own.token_rank * share;
      for (int64_t other = 0; other < job_.layer.cluster(); ++other) {
        HostShared& to = blocks_[other].shared;
        for (int64_t group = 0; group < TwoFour::kGroups; ++group) {
          const int64_t block = table(rank).block(own, group, step);
          if (block < 0 || (own.same_rows(job_.layer) >> other & 1u) == 0) continue;
          host_copy_box(
              to, stage(turn) + block_share_at(group, from), values_, job_.blocks * job_.size, job_.size,
              job_.row_of(block, group) + from, job_.col_of(step), share);
        }
        if ((own.same_tokens(job_.layer) >> other & 1u) == 0) continue;
        for (int64_t box = own.row_rank; box < BlockCluster::kBoxes; box += job_.layer.down) {
          const int64_t token = box * BlockCluster::kBoxTokens;
          host_copy_box(
              to, stage(turn) + static_cast<uint32_t>(token * TwoFour::kTokenPitch), x_, job_.layer.m,
              job_.layer.shape.k, own.token + token, step * BlockCluster::kCell, BlockCluster::kBoxTokens);
        }
      }
    }
  }

  void multiply(int64_t rank, int64_t turn, int64_t step) {
    HostShared& shared = blocks_[rank].shared;
    for (int64_t group = 0; group < TwoFour::kGroups; ++group) {
      if (table(rank).block(tile(rank), group, step) < 0) continue;
      TwoFourLane* const lanes = blocks_[rank].lanes.data() + group * TwoFour::kGroupThreads;
      for (int64_t product = 0; product < BlockCluster::kProducts; ++product) {
        host_block_product(
            shared, lanes, block_weight(stage(turn), group, product), block_tokens(stage(turn), product));
      }
    }
    shared.poison(stage(turn), BlockCluster::kStageBytes);
  }

  const BlockClusterJob& job_;
  const uint16_t* x_;
  const uint16_t* values_;
  int64_t first_;
  std::vector<HostBlockOfCluster> blocks_;
  std::vector<std::vector<int32_t>> memory_;
};

inline void emulate_block_cluster_linear(
    BlockClusterJob job, const uint16_t* x, const uint16_t* values, Epilogue epilogue) {
  job.choose_cluster();
  for (int64_t first = 0; first < job.layer.blocks(); first += job.layer.cluster()) {
    check_partners(job.layer, first);
    HostBlockCluster(job, x, values, first).run(epilogue);
  }
}

}  // namespace sparsebert
