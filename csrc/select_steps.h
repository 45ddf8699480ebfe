// The k-th smallest of many scores and the mask that follows from it, as a grid of blocks finds them: a radix selection
// of three digits, whose histograms are counted in each block's shared memory and added up as integers, so that neither
// the number of blocks nor their order can show. Each block has a stretch of the scores, in their order; hence ties are
// settled by counting the equals of the blocks before.
//
// A block keeps the keys that are still in question in shared memory as soon as they fit: all of them where there are
// few, else those that share the first digit. So memory is read once or twice for the rank, and once more for the mask.

#pragma once

#include <cstdint>

#include "blocks.h"
#include "floats.h"
#include "grid.h"
#include "select_digits.h"

namespace sparsebert {

// A score tensor, its bits, and the weight whose masked copy is written along with them.
struct SelectEntry {
  const float* scores;
  int64_t count;
  int64_t first_unit;  // among the units of all tensors
  uint8_t* bits;
  const void* weight;  // null where no copy is asked for
  void* out;
  Grid grid;
  int64_t first_matrix_unit;  // among those of all matrices that have more than a weight to a bit
  Float weight_type;
  Float out_type;
  bool wide_scores;  // 16-byte loads
  bool wide_matrix;  // 16-byte loads of the weight and stores of the copy

  SB_HOST_DEVICE bool elementwise() const { return grid.elementwise(); }
  SB_HOST_DEVICE int64_t matrix_size() const { return grid.matrix_rows() * grid.matrix_cols(); }
  SB_HOST_DEVICE int64_t matrix_units() const {
    return out == nullptr || elementwise() ? 0 : units_for(matrix_size());
  }
};

struct SelectScratch {
  static constexpr int64_t kMostBlocks = 1024;

  uint64_t bins[kAllBins];
  uint64_t nan;  // 0, or the number of tensors less the place of the first one that has a NaN
  uint64_t equals[kMostBlocks];  // written by each block before any reads them
};

struct SelectJob {
  // Entries that travel with the launch: the whole job stays below the 4 KiB of a kernel's arguments.
  static constexpr int64_t kFew = 32;

  SelectEntry few[kFew];
  const SelectEntry* many;  // where there are more, else null
  int64_t tensors;
  int64_t units;
  int64_t matrix_units;
  // With by_rank the `rank` smallest are pruned; without, those whose key is not above `limit`.
  bool by_rank;
  uint32_t limit;
  int64_t rank;
  int64_t capacity;  // keys that a block's shared memory holds
  bool spare;        // a NaN leaves the copies as they are: some are written over their weights

  SB_HOST_DEVICE const SelectEntry& entry(int64_t at) const { return many != nullptr ? many[at] : few[at]; }
  SelectScratch* scratch;
};

struct SelectShared {
  uint32_t bins[kFirstBins];
  PrefixSums sums;
  uint64_t rank;    // of the one looked for, among those that share its digits so far
  uint64_t equal;   // how many those are, over all blocks
  uint64_t own;     // and in this one
  uint64_t seen;    // equals before the units at hand
  uint32_t prefix;  // the digits found so far; in the end the key
  uint32_t limit;   // keys up to this one are pruned
  uint32_t next_prefix;
  uint32_t cached;  // keys in the cache
  bool collect;     // this round fills the cache
  bool from_cache;
  bool in_order;    // this block's equals are partly pruned, the earlier ones
};

// Where a block's keys begin in its shared memory.
constexpr int64_t kSelectSharedBytes = (sizeof(SelectShared) + 15) / 16 * 16;

// f(entry, its place, unit within it, unit among all) for every `step`-th unit from `first` on.
template <typename F>
SB_HOST_DEVICE void for_units(const SelectJob& job, int64_t first, int64_t end, int64_t step, F&& f) {
  if (first >= end) return;
  int64_t at = 0;
  for (int64_t high = job.tensors; high - at > 1;) {
    const int64_t middle = (at + high) / 2;
    if (job.entry(middle).first_unit <= first) at = middle;
    else high = middle;
  }
  // A copy: what is used of it stays in registers from unit to unit.
  SelectEntry entry = job.entry(at);
  for (int64_t unit = first; unit < end; unit += step) {
    while (unit >= entry.first_unit + units_for(entry.count)) entry = job.entry(++at);
    f(entry, at, unit - entry.first_unit, unit);
  }
}

struct Keys {
  uint32_t key[kUnit];
  bool nan = false;
};

SB_HOST_DEVICE inline int64_t count_in(const SelectEntry& entry, int64_t unit) {
  const int64_t left = entry.count - unit * kUnit;
  return left < kUnit ? left : kUnit;
}

SB_HOST_DEVICE inline Keys load_keys(const SelectEntry& entry, int64_t unit) {
  const int64_t count = count_in(entry, unit);
  const Eight x =
      load_eight(Float::f32, entry.scores, unit * kUnit, count, entry.wide_scores && count == kUnit);
  Keys keys;
#pragma unroll
  for (int j = 0; j < kUnit; ++j) {
    const uint32_t bits = bits_of(x.lane[j]);
    keys.nan = keys.nan || is_nan(bits);
    keys.key[j] = j < count ? key_of(bits) : kNoKey;
  }
  return keys;
}

template <int R, typename Block>
SB_HOST_DEVICE void tally(Block& block, const SelectJob& job) {
  SelectShared& s = block.shared;
  const int64_t begin = share_begin(job.units, block.id, block.blocks);
  const int64_t end = share_begin(job.units, block.id + 1, block.blocks);
  block.threads([&](int64_t thread) {
    for (int64_t bin = thread; bin < Digit<R>::kBins; bin += block.size) s.bins[bin] = 0;
    if (R == 0 && thread == 0) {
      s.prefix = 0;
      s.rank = static_cast<uint64_t>(job.rank);
      s.from_cache = false;
      s.collect = (end - begin) * kUnit <= job.capacity;
      s.cached = s.collect ? static_cast<uint32_t>((end - begin) * kUnit) : 0u;
    }
  });
  block.threads([&](int64_t thread) {
    const uint32_t prefix = s.prefix;
    if (s.from_cache) {
      // Several at a time, whose loads need not wait for the counting of those before.
      constexpr int kTogether = 4;
      const int64_t cached = s.cached;
      for (int64_t first = thread; first < cached; first += kTogether * block.size) {
        uint32_t key[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          const int64_t i = first + j * block.size;
          key[j] = i < cached ? block.keys[i] : kNoKey;
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          if (Digit<R>::follows(key[j], prefix)) atomic_add(&s.bins[Digit<R>::of(key[j])], 1u);
        }
      }
      return;
    }
    const bool collect = s.collect;
    for_units(job, begin + thread, end, block.size, [&](const SelectEntry& entry, int64_t at, int64_t unit, int64_t g) {
      const Keys keys = load_keys(entry, unit);
      if (R == 0 && keys.nan) atomic_most(&job.scratch->nan, static_cast<uint64_t>(job.tensors - at));
      if (R == 0 && collect) {
        Words* cache = reinterpret_cast<Words*>(block.keys + (g - begin) * kUnit);
        cache[0] = {keys.key[0], keys.key[1], keys.key[2], keys.key[3]};
        cache[1] = {keys.key[4], keys.key[5], keys.key[6], keys.key[7]};
      }
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        if (!Digit<R>::follows(keys.key[j], prefix)) continue;
        atomic_add(&s.bins[Digit<R>::of(keys.key[j])], 1u);
        // In whatever order: from here on they are only counted.
        if (R > 0 && collect) block.keys[atomic_next(&s.cached)] = keys.key[j];
      }
    });
  });
}

template <int R, typename Block>
SB_HOST_DEVICE void add_up(Block& block, const SelectJob& job) {
  SelectShared& s = block.shared;
  block.threads([&](int64_t thread) {
    for (int64_t bin = thread; bin < Digit<R>::kBins; bin += block.size) {
      if (s.bins[bin] != 0) atomic_add(&job.scratch->bins[Digit<R>::kFirst + bin], uint64_t{s.bins[bin]});
    }
    if (thread == 0) {
      s.from_cache = s.from_cache || s.collect;
      s.collect = false;
    }
  });
}

// The next digit of the one looked for, from the histogram over all blocks; every block finds the same.
template <int R, typename Block>
SB_HOST_DEVICE void find_digit(Block& block, const SelectJob& job) {
  SelectShared& s = block.shared;
  const uint64_t* bins = job.scratch->bins + Digit<R>::kFirst;
  const int64_t each = (Digit<R>::kBins + block.size - 1) / block.size;
  block.threads([&](int64_t thread) {
    uint64_t sum = 0;
#pragma unroll
    for (int64_t j = 0; j < each; ++j) sum += thread * each + j < Digit<R>::kBins ? bins[thread * each + j] : 0;
    s.sums.put(thread, sum);
  });
  block.threads([&](int64_t thread) { s.sums.add_groups(thread, block.size); });
  block.threads([&](int64_t thread) {
    const uint64_t rank = s.rank;
    uint64_t below = s.sums.before(thread);
    if (rank <= below || rank > s.sums.through(thread)) return;
    // One thread gets here; the bin is the last one with fewer below it. All are loaded before one is looked at.
    int64_t found = thread * each;
    uint64_t seen = below, equal = 0;
#pragma unroll
    for (int64_t j = 0; j < each; ++j) {
      const int64_t bin = thread * each + j;
      const uint64_t count = bin < Digit<R>::kBins ? bins[bin] : 0;
      if (rank > below) {
        found = bin;
        seen = below;
        equal = count;
      }
      below += count;
    }
    s.seen = seen;
    s.equal = equal;
    s.own = s.bins[found];
    s.next_prefix = (s.prefix << Digit<R>::kBits) | static_cast<uint32_t>(found);
  });
  block.threads([&](int64_t thread) {
    if (thread != 0) return;
    s.rank -= s.seen;
    s.prefix = s.next_prefix;
    // For the round after the next; the last one has none.
    s.collect = R == 0 && !s.from_cache && s.own <= static_cast<uint64_t>(job.capacity);
  });
}

template <typename Block>
SB_HOST_DEVICE void look_for_nan(Block& block, const SelectJob& job) {
  const int64_t begin = share_begin(job.units, block.id, block.blocks);
  const int64_t end = share_begin(job.units, block.id + 1, block.blocks);
  block.threads([&](int64_t thread) {
    for_units(job, begin + thread, end, block.size, [&](const SelectEntry& entry, int64_t at, int64_t unit, int64_t) {
      if (load_keys(entry, unit).nan) atomic_most(&job.scratch->nan, static_cast<uint64_t>(job.tensors - at));
    });
  });
}

// Where only some of the equals are pruned: which of this block's are, by what the blocks before have.
template <typename Block>
SB_HOST_DEVICE void settle_ties(Block& block, const SelectJob& job) {
  SelectShared& s = block.shared;
  block.threads([&](int64_t thread) {
    uint64_t sum = 0;
    for (int64_t other = thread; other < block.id; other += block.size) sum += job.scratch->equals[other];
    s.sums.put(thread, sum);
  });
  block.threads([&](int64_t thread) { s.sums.add_groups(thread, block.size); });
  block.threads([&](int64_t thread) {
    if (thread != 0) return;
    s.seen = s.sums.total(block.size);
    s.in_order = s.seen < s.rank && s.seen + s.own > s.rank;
    // No number has key 0, so there is one below.
    s.limit = s.seen < s.rank ? s.prefix : s.prefix - 1;
  });
}

// A unit's byte of the mask, and its part of the masked copy where that has a weight to a bit.
SB_HOST_DEVICE inline void write_unit(const SelectEntry& entry, int64_t unit, uint32_t kept) {
  const int64_t count = count_in(entry, unit);
  global(entry.bits)[unit] = static_cast<uint8_t>(kept);
  if (entry.out == nullptr || !entry.elementwise()) return;
  const bool wide = entry.wide_matrix && count == kUnit;
  const Eight weights = load_eight(entry.weight_type, entry.weight, unit * kUnit, count, wide);
  store_eight(entry.out_type, entry.out, unit * kUnit, count, wide, keep_lanes(weights, kept));
}

SB_HOST_DEVICE inline uint32_t above(const Keys& keys, uint32_t limit, int64_t count) {
  uint32_t kept = 0;
#pragma unroll
  for (int j = 0; j < kUnit; ++j) kept |= static_cast<uint32_t>(keys.key[j] > limit && j < count) << j;
  return kept;
}

template <typename Block>
SB_HOST_DEVICE void write_bits(Block& block, const SelectJob& job) {
  const int64_t begin = share_begin(job.units, block.id, block.blocks);
  const int64_t end = share_begin(job.units, block.id + 1, block.blocks);
  block.threads([&](int64_t thread) {
    const uint32_t limit = block.shared.limit;
    for_units(job, begin + thread, end, block.size, [&](const SelectEntry& entry, int64_t at, int64_t unit, int64_t) {
      const Keys keys = load_keys(entry, unit);
      if (keys.nan) atomic_most(&job.scratch->nan, static_cast<uint64_t>(job.tensors - at));
      write_unit(entry, unit, above(keys, limit, count_in(entry, unit)));
    });
  });
}

// write_bits for the one block in which the equals stop being pruned: a unit to a thread at a time, in order.
template <typename Block>
SB_HOST_DEVICE void write_bits_in_order(Block& block, const SelectJob& job) {
  SelectShared& s = block.shared;
  const int64_t begin = share_begin(job.units, block.id, block.blocks);
  const int64_t end = share_begin(job.units, block.id + 1, block.blocks);
  for (int64_t first = begin; first < end; first += block.size) {
    block.threads([&](int64_t thread) {
      uint64_t equal = 0;
      for_units(job, first + thread, end, job.units, [&](const SelectEntry& entry, int64_t, int64_t unit, int64_t) {
        const Keys keys = load_keys(entry, unit);
#pragma unroll
        for (int j = 0; j < kUnit; ++j) equal += keys.key[j] == s.limit ? 1 : 0;
      });
      s.sums.put(thread, equal);
    });
    block.threads([&](int64_t thread) { s.sums.add_groups(thread, block.size); });
    block.threads([&](int64_t thread) {
      for_units(job, first + thread, end, job.units, [&](const SelectEntry& entry, int64_t, int64_t unit, int64_t) {
        const Keys keys = load_keys(entry, unit);
        uint64_t seen = s.seen + s.sums.before(thread);
        uint32_t kept = above(keys, s.limit, count_in(entry, unit));
#pragma unroll
        for (int j = 0; j < kUnit; ++j) {
          if (keys.key[j] == s.limit && seen++ >= s.rank) kept |= 1u << j;
        }
        write_unit(entry, unit, kept);
      });
    });
    block.threads([&](int64_t thread) {
      if (thread == 0) s.seen += s.sums.total(block.size);
    });
  }
}

// Masked copies of the matrices with many weights to a bit; nothing but NaNs with kSpoil.
template <bool kSpoil, typename Block>
SB_HOST_DEVICE void write_matrices(Block& block, const SelectJob& job) {
  const int64_t begin = share_begin(job.matrix_units, block.id, block.blocks);
  const int64_t end = share_begin(job.matrix_units, block.id + 1, block.blocks);
  block.threads([&](int64_t thread) {
    int64_t at = 0;
    for (int64_t unit = begin + thread; unit < end; unit += block.size) {
      while (unit >= job.entry(at).first_matrix_unit + job.entry(at).matrix_units()) ++at;
      const SelectEntry& entry = job.entry(at);
      const int64_t index = (unit - entry.first_matrix_unit) * kUnit, left = entry.matrix_size() - index;
      const int64_t count = left < kUnit ? left : kUnit;
      const bool wide = entry.wide_matrix && count == kUnit;
      Eight values;
      if (kSpoil) {
#pragma unroll
        for (int j = 0; j < kUnit; ++j) values.lane[j] = float_of(0x7fc00000u);
      } else {
        values = keep_lanes(
            load_eight(entry.weight_type, entry.weight, index, count, wide),
            kept_of_matrix(entry.bits, entry.grid, index, count));
      }
      store_eight(entry.out_type, entry.out, index, count, wide, values);
    }
  });
}

// What a NaN among the scores leaves: no bit set, and NaNs for copies, which no loss can hide.
template <typename Block>
SB_HOST_DEVICE void spoil(Block& block, const SelectJob& job) {
  const int64_t begin = share_begin(job.units, block.id, block.blocks);
  const int64_t end = share_begin(job.units, block.id + 1, block.blocks);
  block.threads([&](int64_t thread) {
    for_units(job, begin + thread, end, block.size, [&](const SelectEntry& entry, int64_t, int64_t unit, int64_t) {
      global(entry.bits)[unit] = 0;
      if (entry.out == nullptr || !entry.elementwise() || job.spare) return;
      const int64_t count = count_in(entry, unit);
      Eight values;
#pragma unroll
      for (int j = 0; j < kUnit; ++j) values.lane[j] = float_of(0x7fc00000u);
      store_eight(entry.out_type, entry.out, unit * kUnit, count, entry.wide_matrix && count == kUnit, values);
    });
  });
  if (!job.spare) write_matrices<true>(block, job);
}

// The whole of it. `launch.blocks(step)` runs step(block) for every block, `launch.meet()` makes them all wait for each
// other, and `launch.any()` is some block, to ask what all agree on.
template <typename Launch>
SB_HOST_DEVICE void run_select(Launch& launch, const SelectJob& job) {
  using Block = typename Launch::Block;
  launch.blocks([&](Block& block) {
    block.threads([&](int64_t thread) {
      for (int64_t i = block.id * block.size + thread; i < kAllBins; i += block.blocks * block.size) {
        job.scratch->bins[i] = 0;
      }
      if (block.id == 0 && thread == 0) job.scratch->nan = 0;
    });
  });
  launch.meet();
  const bool has_rank = job.by_rank && job.rank > 0;
  if (has_rank) {
    launch.blocks([&](Block& block) {
      tally<0>(block, job);
      add_up<0>(block, job);
    });
    launch.meet();
    launch.blocks([&](Block& block) {
      find_digit<0>(block, job);
      tally<1>(block, job);
      add_up<1>(block, job);
    });
    launch.meet();
    launch.blocks([&](Block& block) {
      find_digit<1>(block, job);
      tally<2>(block, job);
      add_up<2>(block, job);
    });
    launch.meet();
    launch.blocks([&](Block& block) {
      find_digit<2>(block, job);
      block.threads([&](int64_t thread) {
        if (thread != 0) return;
        job.scratch->equals[block.id] = block.shared.own;
        block.shared.limit = block.shared.prefix;
        block.shared.in_order = false;
      });
    });
    if (launch.any().shared.rank < launch.any().shared.equal) {
      launch.meet();
      launch.blocks([&](Block& block) { settle_ties(block, job); });
    }
  } else {
    launch.blocks([&](Block& block) {
      block.threads([&](int64_t thread) {
        if (thread != 0) return;
        block.shared.limit = job.by_rank ? kLeastKey : job.limit;
        block.shared.in_order = false;
      });
    });
  }
  if (job.spare && !has_rank) {
    launch.blocks([&](Block& block) { look_for_nan(block, job); });
    launch.meet();
  }
  if (!(job.spare && job.scratch->nan != 0)) {
    launch.blocks([&](Block& block) {
      if (block.shared.in_order) write_bits_in_order(block, job);
      else write_bits(block, job);
    });
  }
  // A rank's first round told already whether there is a NaN.
  if (has_rank && job.matrix_units == 0 && job.scratch->nan == 0) return;
  launch.meet();
  const bool nan = job.scratch->nan != 0;
  launch.blocks([&](Block& block) {
    if (nan) spoil(block, job);
    else write_matrices<false>(block, job);
  });
}

}  // namespace sparsebert
