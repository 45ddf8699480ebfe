// The CUDA kernels' own bodies on the host, block after block and thread after thread, for tests of their index
// arithmetic, digits and ties where there is no GPU. What only concurrency shows it cannot: but threads may run in
// either order between two meetings, and a result that depends on it has lost one.

#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "nm_steps.h"
#include "select_steps.h"
#include "split_steps.h"

namespace sparsebert {

constexpr uint32_t kPoison = 0xa5a5a5a5u;

template <typename S>
struct HostBlock {
  S& shared;
  uint32_t* keys;
  int64_t id;
  int64_t blocks;
  int64_t size;
  bool backwards;

  template <typename F>
  void threads(F&& step) {
    for (int64_t i = 0; i < size; ++i) step(backwards ? size - 1 - i : i);
  }
};

// As much of `blocks` blocks as outlives a step; all of it poisoned first, as on the device it may hold anything.
template <typename S>
class HostLaunch {
 public:
  using Block = HostBlock<S>;

  HostLaunch(int64_t blocks, int64_t threads, int64_t capacity, bool backwards)
      : shared_(blocks), keys_(blocks, std::vector<uint32_t>(capacity + kGuard, kPoison)), backwards_(backwards) {
    for (int64_t id = 0; id < blocks; ++id) {
      std::memset(static_cast<void*>(&shared_[id]), 0xa5, sizeof(S));
      blocks_.push_back({shared_[id], keys_[id].data(), id, blocks, threads, backwards});
    }
  }
  template <typename F>
  void blocks(F&& step) {
    const auto count = static_cast<int64_t>(blocks_.size());
    for (int64_t i = 0; i < count; ++i) step(blocks_[backwards_ ? count - 1 - i : i]);
  }
  void meet() {}
  Block& any() { return blocks_[0]; }
  void check_guards() const {
    for (const std::vector<uint32_t>& keys : keys_) {
      for (size_t i = keys.size() - kGuard; i < keys.size(); ++i) {
        if (keys[i] != kPoison) throw std::runtime_error("a key was written past the end of the shared memory");
      }
    }
  }

 private:
  static constexpr int64_t kGuard = 16;

  std::vector<S> shared_;
  std::vector<std::vector<uint32_t>> keys_;
  std::vector<Block> blocks_;
  bool backwards_;
};

// Returns the place of a tensor with a NaN, or -1. The job's table, rank or limit are set; the rest is set here.
inline int64_t emulate_select(
    SelectJob job, std::vector<SelectEntry> entries, int64_t blocks, int64_t threads, int64_t capacity,
    bool backwards) {
  if (blocks < 1 || blocks > SelectScratch::kMostBlocks || threads < 1 || threads > PrefixSums::kMostThreads) {
    throw std::invalid_argument("blocks, threads: expected at most 1024 each");
  }
  if (capacity < 0 || capacity % kUnit != 0) throw std::invalid_argument("capacity: expected a multiple of 8");
  job.units = job.matrix_units = 0;
  for (SelectEntry& entry : entries) {
    entry.first_unit = job.units;
    entry.first_matrix_unit = job.matrix_units;
    job.units += units_for(entry.count);
    job.matrix_units += entry.matrix_units();
    job.spare = job.spare || (entry.out != nullptr && entry.out == entry.weight);
  }
  job.tensors = static_cast<int64_t>(entries.size());
  job.many = entries.data();
  job.capacity = capacity;
  std::vector<SelectScratch> scratch(1);
  std::memset(static_cast<void*>(scratch.data()), 0xa5, sizeof(SelectScratch));
  job.scratch = scratch.data();
  if (job.units == 0) return -1;
  HostLaunch<SelectShared> launch(blocks, threads, capacity, backwards);
  run_select(launch, job);
  launch.check_guards();
  return scratch[0].nan == 0 ? -1 : job.tensors - static_cast<int64_t>(scratch[0].nan);
}

// Returns whether there is a NaN.
inline bool emulate_nm(NmJob job, int64_t blocks, int64_t threads, bool backwards) {
  uint64_t nan = 0;
  job.nan = &nan;
  HostLaunch<NmShared> launch(blocks, threads, 0, backwards);
  launch.blocks([&](auto& block) { run_nm(block, job); });
  return nan != 0;
}

inline void emulate_split(SplitJob job, int64_t blocks, bool backwards) {
  if (job.grid.elementwise()) {
    HostLaunch<SplitShared> launch(blocks, SplitTiles::kThreads, 0, backwards);
    launch.blocks([&](auto& block) { split_elements(block, job); });
    return;
  }
  std::vector<float> partial(SplitTiles(job.grid).partials(job.grid), float_of(0x7fc00000u));
  job.partial = partial.empty() ? nullptr : partial.data();
  HostLaunch<SplitShared> launch(blocks, SplitTiles::kThreads, 0, backwards);
  launch.blocks([&](auto& block) { split_tiles(block, job); });
  if (job.score_grad == nullptr || partial.empty()) return;
  HostLaunch<SplitSumShared> sums(blocks, SplitTiles::kThreads, 0, backwards);
  sums.blocks([&](auto& block) { split_sums(block, job); });
}

}  // namespace sparsebert
