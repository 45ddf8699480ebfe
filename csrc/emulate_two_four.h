// The packed 2:4 product (two_four.h) on the host: a cluster of blocks at a time, copies, matrix unit and transposing
// stores as the PTX manual describes them, from the very descriptors and words that the device's code makes.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "two_four.h"

namespace sparsebert {

// A block's shared memory. Addresses begin where no descriptor's bits are 0 by chance.
class HostShared {
 public:
  static constexpr uint32_t kBegin = 5 * 1024;

  explicit HostShared(int64_t bytes) : bytes_(bytes) { std::fill(bytes_.begin(), bytes_.end(), 0xa5); }

  uint8_t* at(uint32_t address, int64_t count) {
    if (address < kBegin || address - kBegin + count > static_cast<int64_t>(bytes_.size())) {
      throw std::runtime_error("an address outside of the shared memory");
    }
    return bytes_.data() + (address - kBegin);
  }
  void poison(uint32_t address, int64_t count) { std::memset(at(address, count), 0xa5, count); }

  // Where a swizzle of 128 bytes puts 16 bytes: their place among eight is changed by the row's among eight.
  static uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7u) << 4; }

  // 16 bits of an operand, `byte` bytes into a row.
  uint16_t entry(uint64_t operand, int64_t row, int64_t byte) {
    const auto field = [&](int first) { return static_cast<uint32_t>(operand >> first & 0x3fffu) << 4; };
    const auto down = static_cast<uint32_t>(row), along = static_cast<uint32_t>(byte);
    uint32_t address = field(0) + down / 8 * field(32);
    switch (operand >> 62) {
      case 0: address += down % 8 * 16 + along / 16 * field(16) + along % 16; break;
      case 1: address = swizzled(address + down % 8 * 128 + along); break;
      default: throw std::runtime_error("a swizzle that the host does not know");
    }
    uint16_t value = 0;
    std::memcpy(&value, at(address, 2), 2);
    return value;
  }

 private:
  std::vector<uint8_t> bytes_;
};

struct HostBlockOfCluster {
  HostShared shared;
  std::vector<TwoFourLane> lanes = std::vector<TwoFourLane>(TwoFour::kGroups * TwoFour::kGroupThreads);

  explicit HostBlockOfCluster(int64_t bytes) : shared(bytes) {
    for (TwoFourLane& lane : lanes) std::fill(lane.sum, lane.sum + 64, 0.0f);
  }
};

// Where a stage of the packed product lies, and where a warpgroup gathers columns of x.
inline uint32_t host_stage(int64_t step) {
  return HostShared::kBegin + static_cast<uint32_t>(step % TwoFour::kStages * TwoFour::kStageBytes);
}
inline uint32_t host_slots(int64_t group) {
  return HostShared::kBegin +
         static_cast<uint32_t>(TwoFour::kStages * TwoFour::kStageBytes + group * TwoFour::kSlotBytes);
}

// A tensor map's copy of x [m, k]: `rows` rows of 64 columns from (row, col) on, 0 beyond the edges.
inline void host_copy_box(
    HostShared& to, uint32_t address, const uint16_t* x, int64_t m, int64_t k, int64_t row, int64_t col, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < TwoFour::kCols; ++j) {
      const bool there = row + i < m && col + j < k;
      const uint16_t value = there ? x[(row + i) * k + col + j] : uint16_t{0};
      const auto place = address + static_cast<uint32_t>(i * TwoFour::kTokenPitch + 2 * j);
      std::memcpy(to.at(HostShared::swizzled(place), 2), &value, 2);
    }
  }
}

// wgmma.mma_async.sp m64n128k32 of a warpgroup: `half` names the two threads of four that hold the positions.
inline void host_product(
    HostShared& shared, TwoFourLane* lanes, uint64_t a, uint64_t b, const std::vector<uint32_t>& words, int64_t half) {
  for (int64_t row = 0; row < TwoFour::kGroupRows; ++row) {
    const int64_t first = row / 16 * 32 + row % 8 * 4, high = row % 16 / 8;
    for (int64_t group = 0; group < 8; ++group) {
      const uint32_t word = words[first + 2 * half + group / 4];
      const uint32_t code = word >> (16 * high + 4 * (group % 4)) & 15u;
      if ((code & 3u) >= code >> 2) throw std::runtime_error("positions of a group that do not ascend");
      for (int64_t which = 0; which < 2; ++which) {
        const int64_t k = 4 * group + static_cast<int64_t>(which == 0 ? code & 3u : code >> 2);
        const float value = from_16(Float::bf16, shared.entry(a, row, 2 * (2 * group + which)));
        for (int64_t token = 0; token < TwoFour::kTokens; ++token) {
          float& sum = lanes[first + token % 8 / 2].sum[4 * (token / 8) + 2 * high + token % 2];
          sum += value * from_16(Float::bf16, shared.entry(b, token, 2 * k));
        }
      }
    }
  }
}

// wgmma.mma_async m64n128k16 of a warpgroup: a's rows lane / 4 and 8 more, columns in pairs, in four registers a thread.
inline void host_dense_product(
    HostShared& shared, TwoFourLane* lanes, const Words* a, uint64_t b) {
  for (int64_t thread = 0; thread < TwoFour::kGroupThreads; ++thread) {
    for (int64_t i = 0; i < 8; ++i) {
      const int64_t row = thread / 32 * 16 + thread % 32 / 4 + 8 * (i / 2 % 2);
      const int64_t slot = 2 * (thread % 4) + i % 2 + 8 * (i / 4), first = row / 16 * 32 + row % 8 * 4;
      const auto half = static_cast<uint16_t>(a[thread].word[i / 2] >> (16 * (i % 2)));
      const float value = from_16(Float::bf16, half);
      for (int64_t token = 0; token < TwoFour::kTokens; ++token) {
        float& sum = lanes[first + token % 8 / 2].sum[4 * (token / 8) + 2 * (row % 16 / 8) + token % 2];
        sum += value * from_16(Float::bf16, shared.entry(b, token, 2 * slot));
      }
    }
  }
}

// The columns that a step's residue needs, and, where a chunk ends, their products.
inline void host_residue(HostBlockOfCluster& block, const TwoFourJob& job, const TwoFourTile& tile, int64_t step) {
  for (int64_t group = 0; group < TwoFour::kGroups; ++group) {
    const int64_t rows = tile.row_tile * TwoFour::kGroups + group;
    const TwoFourSpan span = job.residue.span(rows, job.shape.steps(), step);
    const uint32_t slots = host_slots(group), stage = host_stage(step);
    for (int64_t token = 0; token < TwoFour::kTokens; ++token) {
      for (uint32_t slot = span.first(); slot < span.end(); ++slot) {
        const int64_t col = job.residue.slots(rows, span)[slot];
        std::memcpy(
            block.shared.at(slots + two_four_slot_at(slot, token), 2),
            block.shared.at(stage + two_four_entry_at(token, col), 2), 2);
      }
    }
    if (!span.ends_chunk()) continue;
    for (int64_t product = 0; product < job.residue.products; ++product) {
      host_dense_product(
          block.shared, block.lanes.data() + group * TwoFour::kGroupThreads,
          job.residue.operand(rows, span, product, 0), two_four_slots(slots, product));
    }
  }
}

inline void host_begin(HostBlockOfCluster& block) {
  for (int64_t group = 0; group < TwoFour::kGroups; ++group) {
    std::memset(block.shared.at(host_slots(group), TwoFour::kSlotBytes), 0, TwoFour::kSlotBytes);
  }
}

struct HostTwoFourWarp {
  HostBlockOfCluster& block;
  int64_t at;

  int64_t number() const { return at; }
  template <typename F>
  void lanes(F&& step) {
    for (int64_t lane = 0; lane < 32; ++lane) step(lane, block.lanes[32 * at + lane]);
  }
  // stmatrix.x4.trans: lane / 8 names a row of matrix lane / 8, which becomes its column.
  void store_turned() {
    for (int64_t matrix = 0; matrix < 4; ++matrix) {
      for (int64_t row = 0; row < 8; ++row) {
        for (int64_t col = 0; col < 8; ++col) {
          const uint32_t pair = block.lanes[32 * at + 4 * row + col / 2].words[matrix];
          const auto value = static_cast<uint16_t>(pair >> (16 * (col % 2)));
          const uint32_t to = block.lanes[32 * at + 8 * matrix + col].to;
          if (to % 16 != 0) throw std::runtime_error("a row that is stored is not aligned");
          std::memcpy(block.shared.at(HostShared::kBegin + to + static_cast<uint32_t>(2 * row), 2), &value, 2);
        }
      }
    }
  }
};

inline void host_multiply(HostBlockOfCluster& block, int64_t step) {
  const uint32_t stage = host_stage(step);
  for (int64_t group = 0; group < TwoFour::kGroups; ++group) {
    std::vector<uint32_t> words(TwoFour::kGroupThreads);
    for (int64_t thread = 0; thread < TwoFour::kGroupThreads; ++thread) {
      const auto at = stage + static_cast<uint32_t>(two_four_meta_at(group, thread));
      std::memcpy(&words[thread], block.shared.at(at, 4), 4);
    }
    TwoFourLane* lanes = block.lanes.data() + group * TwoFour::kGroupThreads;
    for (int64_t half = 0; half < TwoFour::kHalves; ++half) {
      host_product(
          block.shared, lanes, two_four_weight(stage, group, half), two_four_tokens(stage, half), words, half);
    }
  }
}

template <Epilogue kEpilogue>
void host_finish_with(HostBlockOfCluster& block, const TwoFourJob& job, const TwoFourTile& tile) {
  for (int64_t number = 0; number < 8; ++number) {
    HostTwoFourWarp warp{block, number};
    two_four_publish<kEpilogue, Float::bf16>(warp, job, tile.row_tile);
  }
  const uint8_t* rows = block.shared.at(HostShared::kBegin, TwoFour::kTokens * TwoFour::kPitch);
  for (int64_t thread = 0; thread < 256; ++thread) two_four_store(job, tile, rows, thread, 256);
}

inline void host_finish(
    HostBlockOfCluster& block, const TwoFourJob& job, const TwoFourTile& tile, Epilogue epilogue) {
  switch (epilogue) {
    case Epilogue::gelu: return host_finish_with<Epilogue::gelu>(block, job, tile);
    case Epilogue::gelu_tanh: return host_finish_with<Epilogue::gelu_tanh>(block, job, tile);
    case Epilogue::relu: return host_finish_with<Epilogue::relu>(block, job, tile);
    case Epilogue::tanh: return host_finish_with<Epilogue::tanh>(block, job, tile);
    default: return host_finish_with<Epilogue::none>(block, job, tile);
  }
}

inline void host_cluster(const TwoFourJob& job, const uint16_t* x, int64_t first, Epilogue epilogue) {
  constexpr int64_t kBytes = TwoFour::kStages * TwoFour::kStageBytes + TwoFour::kGroups * TwoFour::kSlotBytes;
  std::vector<HostBlockOfCluster> blocks(job.cluster(), HostBlockOfCluster(kBytes));
  const auto fetch = [&](int64_t step) {
    const uint32_t stage = host_stage(step);
    for (int64_t rank = 0; rank < job.cluster(); ++rank) {
      const TwoFourTile tile(job, first + rank);
      const TwoFourShare share(job, tile, step);
      if (share.bytes % 16 != 0) throw std::runtime_error("a copy that is not of 16 bytes");
      for (int64_t other = 0; other < job.cluster(); ++other) {
        HostShared& to = blocks[other].shared;
        if (tile.same_rows(job) >> other & 1u) {
          std::memcpy(to.at(stage + static_cast<uint32_t>(share.bytes_at), share.bytes), share.from, share.bytes);
        }
        if (tile.same_tokens(job) >> other & 1u) {
          host_copy_box(
              to, stage + static_cast<uint32_t>(share.tokens_at), x, job.m, job.shape.k, share.token,
              step * TwoFour::kCols, share.tokens);
        }
      }
    }
  };
  const int64_t steps = job.shape.steps();
  for (int64_t step = 0; step < std::min(steps, TwoFour::kStages - 1); ++step) fetch(step);
  for (HostBlockOfCluster& block : blocks) host_begin(block);
  for (int64_t step = 0; step < steps; ++step) {
    if (step + TwoFour::kStages - 1 < steps) fetch(step + TwoFour::kStages - 1);
    for (int64_t rank = 0; rank < job.cluster(); ++rank) {
      host_multiply(blocks[rank], step);
      if (job.residue.values != nullptr) host_residue(blocks[rank], job, TwoFourTile(job, first + rank), step);
      blocks[rank].shared.poison(host_stage(step), TwoFour::kStageBytes);
    }
  }
  for (int64_t rank = 0; rank < job.cluster(); ++rank) {
    host_finish(blocks[rank], job, TwoFourTile(job, first + rank), epilogue);
  }
}

// Whoever gets copies of a block is told of by it: counted once for each, as the barriers of the stages are.
inline void check_partners(const TwoFourJob& job, int64_t first) {
  for (int64_t rank = 0; rank < job.cluster(); ++rank) {
    const TwoFourTile tile(job, first + rank);
    uint32_t told = 0;
    for (int64_t i = 0; i < TwoFourTile::partners(job); ++i) told ^= 1u << tile.partner(job, i);
    if (told != (tile.same_rows(job) | tile.same_tokens(job))) throw std::runtime_error("partners that are not told");
  }
}

inline void emulate_two_four_linear(TwoFourJob job, const uint16_t* x, Epilogue epilogue) {
  job.choose_cluster();
  for (int64_t first = 0; first < job.blocks(); first += job.cluster()) {
    check_partners(job, first);
    host_cluster(job, x, first, epilogue);
  }
}

inline void emulate_two_four_pack(const TwoFourPack& job) {
  for (int64_t unit = 0; unit < job.shape.packed_bytes() / 16; ++unit) {
    const Words words = two_four_unit(job, unit);
    std::memcpy(job.packed + 16 * unit, &words, 16);
  }
}

}  // namespace sparsebert
