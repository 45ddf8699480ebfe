// W·mask for a list of matrices in one parallel pass.

#pragma once

#include <vector>

#include "rows.h"

namespace sparsebert {

struct MaskedCopy {
  Grid grid;
  const uint8_t* bits;
  Dtype in_dtype;
  const void* in;
  Dtype out_dtype;
  void* out;
};

void copy_masked(const std::vector<MaskedCopy>& copies, Isa isa);

}  // namespace sparsebert
