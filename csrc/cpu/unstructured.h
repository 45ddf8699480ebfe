// The tiled CSR of an unstructured weight [N, K], and n:m's way of storing positions. What each array holds is told in
// sparsebert/ops/unstructured_linear.py and semi_structured_linear.py.

#pragma once

#include <cstdint>

#include "tensors.h"

namespace sparsebert {

// Tiles of kStrip rows by kPanel columns, strip after strip. A panel of the activations, kPanel columns of some 64 rows,
// stays in L1 while a strip of the weight goes by; the strip's outputs stay in L2.
constexpr int64_t kStrip = 256;
constexpr int64_t kPanel = 128;
constexpr int64_t kOffsets = 256;  // what a byte can say: a panel's buffer has room for that, whatever the offsets are

struct TiledCsr {
  int64_t n, k;
  const void* values;
  const uint8_t* offsets;
  const uint8_t* rows;
  const uint8_t* counts;
  const int64_t* starts;

  int64_t strips() const { return (n + kStrip - 1) / kStrip; }
  int64_t panels() const { return (k + kPanel - 1) / kPanel; }
  int64_t rows_in(int64_t strip) const { return strip + 1 < strips() ? kStrip : n - strip * kStrip; }
  int64_t columns_in(int64_t panel) const { return panel + 1 < panels() ? kPanel : k - panel * kPanel; }
  int64_t tile(int64_t strip, int64_t panel) const { return strip * panels() + panel; }
  // Where a tile's entries begin in rows and counts: one a row of the tile, those of few weights first, so that the
  // lengths of the kernels' loops can be predicted.
  int64_t entry(int64_t strip, int64_t panel) const { return strip * kStrip * panels() + panel * rows_in(strip); }
};

// Checks everything but what the kernels check as they meet it: that a tile's counts add up.
TiledCsr check_tiled_csr(
    int64_t nnz, const Tensor& offsets, const Tensor& rows, const Tensor& counts, const Tensor& starts, int64_t n,
    int64_t k);

}  // namespace sparsebert
