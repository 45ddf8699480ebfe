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

  uint64_t each[kMostThreads];
  uint64_t group[kMostThreads / kGroup];

  // The step after every thread wrote `each`.
  SB_HOST_DEVICE void add_groups(int64_t thread, int64_t threads) {
    const int64_t first = thread * kGroup;
    if (first >= threads) return;
    uint64_t sum = 0;
    for (int64_t i = first; i < first + kGroup && i < threads; ++i) sum += each[i];
    group[thread] = sum;
  }
  // The step after that: the sum of `each` over the threads before this one.
  SB_HOST_DEVICE uint64_t before(int64_t thread) const {
    uint64_t sum = 0;
    for (int64_t i = 0; i < thread / kGroup; ++i) sum += group[i];
    for (int64_t i = thread / kGroup * kGroup; i < thread; ++i) sum += each[i];
    return sum;
  }
  SB_HOST_DEVICE uint64_t total(int64_t threads) const {
    uint64_t sum = 0;
    for (int64_t i = 0; i * kGroup < threads; ++i) sum += group[i];
    return sum;
  }
};

}  // namespace sparsebert
