// The k-th smallest of many scores, exactly, in about one pass over memory.

#pragma once

#include <cstdint>
#include <vector>

#include "scan.h"

namespace sparsebert {

// A stretch of one score tensor; its bits start on a byte.
struct Chunk {
  const float* x;
  int64_t n;
  uint8_t* bits;
  int64_t tensor;
};

struct Threshold {
  float value = 0;      // the k-th smallest
  int64_t less = 0;     // scores below it
  int64_t equal = 0;    // scores equal to it
  int64_t nan_in = -1;  // a tensor with a NaN, or -1; the rest means nothing then
};

// k from 1 to the number of scores. NaNs are found wherever they are.
Threshold kth_smallest(const std::vector<Chunk>& chunks, int64_t k, const ScanKernels& kernels);

}  // namespace sparsebert
