#include "unstructured.h"

namespace sparsebert {

TiledCsr check_tiled_csr(
    int64_t nnz, const Tensor& offsets, const Tensor& rows, const Tensor& counts, const Tensor& starts, int64_t n,
    int64_t k) {
  check_shape(n, k);
  for (const auto& [tensor, name] : {std::pair{&offsets, "offsets"}, {&rows, "rows"}, {&counts, "counts"}, {&starts, "starts"}}) {
    check_contiguous(*tensor, name);
    STD_TORCH_CHECK(tensor->dim() == 1, name, ": expected one dimension");
  }
  STD_TORCH_CHECK(
      offsets.scalar_type() == ScalarType::Byte && rows.scalar_type() == ScalarType::Byte &&
          counts.scalar_type() == ScalarType::Byte && starts.scalar_type() == ScalarType::Long,
      "offsets, rows, counts, starts: expected uint8, uint8, uint8, int64");
  const TiledCsr w{n, k, nullptr, const_data<uint8_t>(offsets),
                   const_data<uint8_t>(rows), const_data<uint8_t>(counts), const_data<int64_t>(starts)};
  const int64_t tiles = w.strips() * w.panels();
  STD_TORCH_CHECK(offsets.numel() == nnz, "offsets: expected [", nnz, "], got ", offsets.numel(), " entries");
  STD_TORCH_CHECK(
      rows.numel() == w.panels() * w.n && counts.numel() == rows.numel(), "rows, counts: expected [", w.panels() * w.n,
      "], got ", rows.numel(), " and ", counts.numel(), " entries");
  STD_TORCH_CHECK(starts.numel() == tiles + 1, "starts: expected [", tiles + 1, "], got ", starts.numel(), " entries");
  bool ascending = w.starts[0] == 0 && w.starts[tiles] == nnz;
  for (int64_t i = 0; i < tiles; ++i) ascending &= w.starts[i] <= w.starts[i + 1];
  STD_TORCH_CHECK(ascending, "starts: expected to rise from 0 to ", nnz);
  return w;
}

}  // namespace sparsebert
