// A kernel's blocks and threads, so that one body runs on the device and, thread after thread, on the host where tests
// look at its numbers. A body is written in steps: `block.threads(step)` runs step(thread) for every thread of a block
// and then lets them all meet; what threads tell each other goes through the block's shared memory.

#pragma once

#include <cstdint>

#include "grid.h"

namespace sparsebert {

template <typename T>
SB_HOST_DEVICE void atomic_add(T* to, T value) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 8) {
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
  } else {
    atomicAdd(to, value);
  }
#else
  *to += value;
#endif
}

// The value before.
SB_HOST_DEVICE inline uint32_t atomic_next(uint32_t* counter) {
#if defined(__CUDA_ARCH__)
  return atomicAdd(counter, 1u);
#else
  return (*counter)++;
#endif
}

SB_HOST_DEVICE inline void atomic_most(uint64_t* to, uint64_t value) {
#if defined(__CUDA_ARCH__)
  atomicMax(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
#else
  if (*to < value) *to = value;
#endif
}

// Room for a sum over the threads that came before, in a fixed order and without a word about warps.
struct PrefixSums {
  static constexpr int64_t kMostThreads = 1024;
  static constexpr int64_t kGroup = 32;

  // A gap after every group: the threads that add up the groups then read from different banks.
  uint64_t each[kMostThreads + kMostThreads / kGroup];
  uint64_t group[kMostThreads / kGroup];

  SB_HOST_DEVICE static int64_t place(int64_t thread) { return thread + thread / kGroup; }
  SB_HOST_DEVICE void put(int64_t thread, uint64_t value) { each[place(thread)] = value; }
  // The step after every thread put its value: from here on `each` is a sum from the group's first thread on.
  SB_HOST_DEVICE void add_groups(int64_t thread, int64_t threads) {
    const int64_t first = thread * kGroup;
    if (first >= threads) return;
    uint64_t sum = 0, *own = each + place(first);
#pragma unroll 8
    for (int64_t i = 0; i < kGroup; ++i) {
      if (first + i < threads) own[i] = sum += own[i];
    }
    group[thread] = sum;
  }
  // The step after that: the sum of what the threads up to this one put.
  SB_HOST_DEVICE uint64_t through(int64_t thread) const {
    uint64_t sum = each[place(thread)];
    for (int64_t i = 0; i < thread / kGroup; ++i) sum += group[i];
    return sum;
  }
  SB_HOST_DEVICE uint64_t before(int64_t thread) const { return thread == 0 ? 0 : through(thread - 1); }
  SB_HOST_DEVICE uint64_t total(int64_t threads) const {
    uint64_t sum = 0;
    for (int64_t i = 0; i * kGroup < threads; ++i) sum += group[i];
    return sum;
  }
};

}  // namespace sparsebert
