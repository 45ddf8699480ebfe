#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "masked_weight.h"
#include "scan.h"
#include "select.h"
#include "tensors.h"

namespace sparsebert {
namespace {

constexpr int64_t kChunk = 1 << 16;

std::vector<Chunk> chunks_of(const std::vector<Tensor>& scores, const std::vector<Tensor>& bits) {
  STD_TORCH_CHECK(scores.size() == bits.size(), "bits: expected one per score tensor");
  std::vector<Chunk> chunks;
  for (size_t t = 0; t < scores.size(); ++t) {
    check_contiguous(scores[t], "scores");
    STD_TORCH_CHECK(scores[t].scalar_type() == ScalarType::Float, "scores: expected float32");
    const int64_t n = scores[t].numel();
    check_bits(bits[t], n);
    for (int64_t first = 0; first < n; first += kChunk) {
      chunks.push_back({const_data<float>(scores[t]) + first, std::min(kChunk, n - first),
                        data<uint8_t>(bits[t]) + first / 8, static_cast<int64_t>(t)});
    }
  }
  return chunks;
}

std::vector<MaskedCopy> copies_of(
    const std::vector<Tensor>& scores, const std::vector<Tensor>& weights, const std::vector<Tensor>& bits,
    const std::vector<Tensor>& out) {
  STD_TORCH_CHECK(weights.size() == out.size(), "out: expected one per weight");
  STD_TORCH_CHECK(weights.empty() || weights.size() == scores.size(), "weights: expected one per score tensor");
  std::vector<MaskedCopy> copies;
  for (size_t t = 0; t < weights.size(); ++t) {
    check_contiguous(weights[t], "weights");
    check_contiguous(out[t], "out");
    STD_TORCH_CHECK(scores[t].dim() == 2, "scores: expected a grid [GN, GK] on its weight");
    STD_TORCH_CHECK(out[t].numel() == weights[t].numel(), "out: expected the shape of its weight");
    copies.push_back({grid_on(weights[t], scores[t].size(0), scores[t].size(1)), const_data<uint8_t>(bits[t]),
                      dtype_of(weights[t], "weights"), weights[t].const_data_ptr(), dtype_of(out[t], "out"),
                      out[t].mutable_data_ptr()});
  }
  return copies;
}

void refuse_nan(int64_t tensor) {
  STD_TORCH_CHECK(tensor < 0, "scores[", tensor, "]: has a NaN");
}

// Bits = above the value; returns a tensor with a NaN, or -1.
int64_t pack_all(const std::vector<Chunk>& chunks, float value, bool or_equal, const ScanKernels& kernels) {
  std::vector<uint8_t> nan(chunks.size(), 0);
  torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      nan[c] = kernels.pack_above(chunks[c].x, chunks[c].n, value, or_equal, chunks[c].bits);
    }
  });
  const auto first = std::find(nan.begin(), nan.end(), 1);
  return first == nan.end() ? -1 : chunks[first - nan.begin()].tensor;
}

// Ties: the first `pruned` scores equal to the value are pruned, the later ones kept. A chunk wholly before or after
// the place where that changes needs one comparison; the one around it is walked.
void pack_ties(const std::vector<Chunk>& chunks, float value, int64_t pruned, const ScanKernels& kernels) {
  const auto count = static_cast<int64_t>(chunks.size());
  std::vector<int64_t> equal(count, 0);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) equal[c] = kernels.count_equal(chunks[c].x, chunks[c].n, value);
  });
  std::vector<int64_t> before(count + 1, 0);
  for (int64_t c = 0; c < count; ++c) before[c + 1] = before[c] + equal[c];
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const Chunk& chunk = chunks[c];
      kernels.pack_above(chunk.x, chunk.n, value, before[c] >= pruned, chunk.bits);
      if (before[c] >= pruned || before[c + 1] <= pruned) continue;
      int64_t seen = before[c];
      for (int64_t i = 0; i < chunk.n; ++i) {
        if (chunk.x[i] == value && ++seen > pruned) chunk.bits[i >> 3] |= static_cast<uint8_t>(1u << (i & 7));
      }
    }
  });
}

void select_mask(
    std::vector<Tensor> scores, int64_t num_pruned, std::vector<Tensor> weights, std::vector<Tensor> bits,
    std::vector<Tensor> out) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const std::vector<Chunk> chunks = chunks_of(scores, bits);
  const std::vector<MaskedCopy> copies = copies_of(scores, weights, bits, out);
  int64_t total = 0;
  for (const Chunk& chunk : chunks) total += chunk.n;
  STD_TORCH_CHECK(num_pruned >= 0 && num_pruned <= total, "num_pruned: expected 0 to ", total, ", got ", num_pruned);
  const Isa isa = active_isa();
  const ScanKernels& kernels = scan_kernels(isa);
  if (num_pruned == 0 || num_pruned == total) {
    refuse_nan(pack_all(chunks, num_pruned == 0 ? -kInfinity : kInfinity, num_pruned == 0, kernels));
  } else {
    const Threshold threshold = kth_smallest(chunks, num_pruned, kernels);
    refuse_nan(threshold.nan_in);
    const int64_t pruned_ties = num_pruned - threshold.less;
    if (pruned_ties == threshold.equal) pack_all(chunks, threshold.value, false, kernels);
    else pack_ties(chunks, threshold.value, pruned_ties, kernels);
  }
  copy_masked(copies, isa);
}

void threshold_mask(
    std::vector<Tensor> scores, double threshold, std::vector<Tensor> weights, std::vector<Tensor> bits,
    std::vector<Tensor> out) {
  const std::vector<Chunk> chunks = chunks_of(scores, bits);
  const std::vector<MaskedCopy> copies = copies_of(scores, weights, bits, out);
  const Isa isa = active_isa();
  refuse_nan(pack_all(chunks, float_below(threshold), false, scan_kernels(isa)));
  copy_masked(copies, isa);
}

}  // namespace
}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CPU, m) {
  m.impl("select_mask", TORCH_BOX(&sparsebert::select_mask));
  m.impl("threshold_mask", TORCH_BOX(&sparsebert::threshold_mask));
}
