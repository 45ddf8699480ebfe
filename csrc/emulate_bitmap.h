// A warp of the bitmap kernels (bitmap.h) on the host, lane after lane; the rest of emulate.h's promises hold here too.
// Copies come as late as they may, and a tensor core multiplies what its manual says that the lanes' registers hold.

#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "bitmap.h"

namespace sparsebert {

template <int T>
class HostBitmapWarp {
 public:
  explicit HostBitmapWarp(bool backwards) : lanes_(kBitmapLanes), backwards_(backwards) {
    std::memset(static_cast<void*>(lanes_.data()), 0xa5, lanes_.size() * sizeof(BitmapLane<T>));
  }

  template <typename F>
  void lanes(F&& step) {
    for (int64_t i = 0; i < kBitmapLanes; ++i) {
      const int64_t lane = backwards_ ? kBitmapLanes - 1 - i : i;
      step(lane, lanes_[lane]);
    }
  }
  void meet() {}

  void copy4(void* to, const void* from) { open_.push_back({to, from, 4, 4}); }
  void copy16(void* to, const void* from, uint32_t bytes) {
    if (bytes > 16 || reinterpret_cast<uintptr_t>(from) % 16 != 0 || reinterpret_cast<uintptr_t>(to) % 16 != 0) {
      throw std::runtime_error("a copy of 16 bytes is not aligned, or longer");
    }
    open_.push_back({to, from, bytes, 16});
  }
  void commit() {
    groups_.push_back(open_);
    open_.clear();
  }
  void wait() { wait_for(kBitmapStages - 2); }
  void wait_all() {
    commit();
    wait_for(0);
  }

  void count_before() {
    int64_t sum = 0;
    for (BitmapLane<T>& own : lanes_) {
      own.before = sum;
      for (uint32_t bits = own.bits; bits != 0; bits &= bits - 1) ++sum;
    }
  }

  // mma.m16n8k16, four times: the PTX manual's layouts of A, B and C.
  template <int A>
  void multiply(int j) {
    for (int s = 0; s < 4; ++s) {
      float a[16][16], b[16][8];
      for (int64_t lane = 0; lane < kBitmapLanes; ++lane) {
        for (int i = 0; i < 8; ++i) {
          const int64_t row = lane / 4 + (i % 4 >= 2 ? 8 : 0), k = lane % 4 * 2 + i % 2 + (i >= 4 ? 8 : 0);
          a[row][k] = half_of(lanes_[lane].words[4 * s + i / 2], i % 2);
          if (i >= 4) continue;
          const int64_t of_b = lane % 4 * 2 + i % 2 + (i >= 2 ? 8 : 0);
          b[of_b][lane / 4] = half_of(lanes_[lane].x[j % A][2 * s + i / 2], i % 2);
        }
      }
      for (int64_t lane = 0; lane < kBitmapLanes; ++lane) {
        for (int i = 0; i < 4; ++i) {
          const int64_t row = lane / 4 + (i >= 2 ? 8 : 0), token = lane % 4 * 2 + i % 2;
          for (int k = 0; k < 16; ++k) lanes_[lane].sum[j][i] += a[row][k] * b[k][token];
        }
      }
    }
  }

 private:
  struct Copy {
    void* to;
    const void* from;
    uint32_t bytes;
    uint32_t size;
  };

  static float half_of(uint32_t word, int half) {
    return from_16(Float::bf16, static_cast<uint16_t>(word >> (16 * half)));
  }
  void wait_for(size_t pending) {
    while (groups_.size() > pending) {
      for (const Copy& copy : groups_.front()) {
        std::memset(copy.to, 0, copy.size);
        std::memcpy(copy.to, copy.from, copy.bytes);
      }
      groups_.erase(groups_.begin());
    }
  }

  std::vector<BitmapLane<T>> lanes_;
  std::vector<Copy> open_;
  std::vector<std::vector<Copy>> groups_;
  bool backwards_;
};

inline std::vector<BitmapStage> poisoned_stages(int64_t count) {
  std::vector<BitmapStage> stages(count);
  std::memset(static_cast<void*>(stages.data()), 0xa5, count * sizeof(BitmapStage));
  return stages;
}

template <int T>
void emulate_bitmap_block(const BitmapJob& job, int64_t block, int64_t token_tile, int64_t split, bool backwards) {
  std::vector<float> sums(kBitmapWarps * 8 * T * kBitmapPitch, float_of(0x7fc00000u));
  for (int64_t i = 0; i < kBitmapWarps; ++i) {
    const int64_t number = backwards ? kBitmapWarps - 1 - i : i;
    HostBitmapWarp<T> warp(backwards);
    std::vector<BitmapStage> stages = poisoned_stages(kBitmapStages);
    bitmap_multiply<T>(warp, job, bitmap_part(job.plan, block, token_tile, split, number), stages.data());
    warp.wait_all();
    bitmap_publish<T>(warp, sums.data() + number * 8 * T * kBitmapPitch);
  }
  const int64_t threads = kBitmapLanes * kBitmapWarps;
  for (int64_t thread = 0; thread < threads; ++thread) {
    bitmap_add(Float::bf16, job, block, token_tile, split, sums.data(), thread, threads);
  }
}

// Sets the job's plan and partial sums; the rest is given.
inline void emulate_bitmap_linear(BitmapJob job, int64_t processors, bool backwards) {
  job.plan = bitmap_plan(job.weight.n, job.weight.k, job.m, processors);
  std::vector<float> partial(job.plan.splits > 1 ? job.plan.splits * job.m * job.weight.n : 0, float_of(0x7fc00000u));
  job.partial = partial.empty() ? nullptr : partial.data();
  for (int64_t split = 0; split < job.plan.splits; ++split) {
    for (int64_t tile = 0; tile < job.plan.token_tiles; ++tile) {
      for (int64_t block = 0; block < job.plan.row_blocks(); ++block) {
        switch (job.plan.groups) {
          case 1: emulate_bitmap_block<1>(job, block, tile, split, backwards); break;
          case 2: emulate_bitmap_block<2>(job, block, tile, split, backwards); break;
          case 4: emulate_bitmap_block<4>(job, block, tile, split, backwards); break;
          default: emulate_bitmap_block<8>(job, block, tile, split, backwards); break;
        }
      }
    }
  }
  if (job.partial == nullptr) return;
  for (int64_t thread = 0; thread < 7; ++thread) bitmap_add_splits(Float::bf16, job, thread, 7);
}

// The dense weight into `dense`, or (values given) the other way round.
inline void emulate_bitmap_tiles(
    const BitmapWeight& weight, uint16_t* dense, uint16_t* values, bool wide, bool backwards) {
  for (int64_t tile = 0; tile < weight.tiles(); ++tile) {
    HostBitmapWarp<1> warp(backwards);
    std::vector<BitmapStage> stage = poisoned_stages(1);
    if (values == nullptr) bitmap_write_tile(warp, weight, stage[0], tile, dense, wide);
    else bitmap_read_tile(warp, weight, stage[0], tile, dense, wide, values);
  }
}

}  // namespace sparsebert
