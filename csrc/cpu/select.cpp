// A sample brackets the k-th smallest; one pass counts what is below the bracket and collects what is inside; the
// answer is then found among the few collected. Where the sample misled (heavy structure, bad luck) two histogram
// passes over the scores' order-preserving integers find it instead. Both are exact, so the result never depends on
// the sample, the number of threads or the instruction set.

#include "select.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

namespace sparsebert {
namespace {

constexpr int64_t kSample = 8192;

struct Bracket {
  float low;
  float high;
};

int64_t count_of(const std::vector<Chunk>& chunks) {
  int64_t total = 0;
  for (const Chunk& chunk : chunks) total += chunk.n;
  return total;
}

// One score from each of kSample equal stretches, at a place that a fixed hash picks (no pattern of the weights can
// keep step with it). NaNs are left out: they have no place in an order.
std::vector<float> sample_of(const std::vector<Chunk>& chunks, int64_t total) {
  std::vector<float> sample;
  sample.reserve(kSample);
  size_t at = 0;
  int64_t start = 0;
  uint64_t state = 0x9e3779b97f4a7c15ull;
  for (int64_t i = 0; i < kSample; ++i) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    const int64_t first = total / kSample * i, width = total / kSample;
    const int64_t place = first + static_cast<int64_t>((state >> 33) % static_cast<uint64_t>(width));
    while (place >= start + chunks[at].n) start += chunks[at++].n;
    const float value = chunks[at].x[place - start];
    if (value == value) sample.push_back(value);
  }
  return sample;
}

// Four standard deviations of a sampled rank on either side: missed less than once in 10,000 calls.
Bracket bracket_of(std::vector<float>& sample, int64_t k, int64_t total) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const double size = static_cast<double>(sample.size());
  const double quantile = (static_cast<double>(k) - 0.5) / static_cast<double>(total);
  const double margin = 4 * std::sqrt(size * quantile * (1 - quantile)) + 2;
  const auto low = static_cast<int64_t>(std::floor(size * quantile - margin));
  const auto high = static_cast<int64_t>(std::ceil(size * quantile + margin));
  Bracket bracket{-kInfinity, kInfinity};
  auto begin = sample.begin();
  if (low >= 0 && low < static_cast<int64_t>(sample.size())) {
    std::nth_element(begin, begin + low, sample.end());
    bracket.low = sample[low];
    begin += low;
  }
  if (high >= 0 && high < static_cast<int64_t>(sample.size())) {
    std::nth_element(begin, sample.begin() + high, sample.end());
    bracket.high = sample[high];
  }
  return bracket;
}

// Among values that are no NaN, already in one buffer: the k-th smallest, narrowing by samples while there are many.
Threshold kth_of_buffer(std::vector<float> values, int64_t k, const ScanKernels& kernels) {
  int64_t below = 0;
  while (static_cast<int64_t>(values.size()) > 2 * kSample) {
    const auto size = static_cast<int64_t>(values.size());
    std::vector<float> sample = sample_of({{values.data(), size, nullptr, 0}}, size);
    const Bracket bracket = bracket_of(sample, k, size);
    std::vector<float> inside(size + 16);
    const BracketCount count =
        kernels.count_bracket(values.data(), size, bracket.low, bracket.high, inside.data(), size);
    const int64_t rank = k - count.less;
    if (rank <= count.at_low || rank > count.at_low + count.interior || count.interior > size / 2) break;
    inside.resize(count.interior);
    below += count.less + count.at_low;
    k = rank - count.at_low;
    values.swap(inside);
  }
  std::nth_element(values.begin(), values.begin() + (k - 1), values.end());
  Threshold found;
  found.value = values[k - 1];
  found.less = below;
  for (const float value : values) {
    found.less += value < found.value;
    found.equal += value == found.value;
  }
  return found;
}

// Integers in the order of the floats; -0.0 becomes 0.0 first.
uint32_t ordered(float value) {
  const float positive_zero = value + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &positive_zero, 4);
  return bits ^ ((bits >> 31) ? 0xffffffffu : 0x80000000u);
}

// Adds up a histogram of 2^16 bins over all chunks: bin_of gives the bin, or -1 for a score that does not count.
template <typename BinOf>
std::vector<int64_t> histogram(const std::vector<Chunk>& chunks, BinOf bin_of) {
  constexpr int64_t kParts = 8;
  const auto count = static_cast<int64_t>(chunks.size());
  std::vector<std::vector<int64_t>> parts(kParts);
  torch::stable::parallel_for(0, kParts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      parts[part].assign(1 << 16, 0);
      for (int64_t c = part * count / kParts; c < (part + 1) * count / kParts; ++c) {
        for (int64_t i = 0; i < chunks[c].n; ++i) {
          const int64_t bin = bin_of(chunks[c].x[i]);
          if (bin >= 0) ++parts[part][bin];
        }
      }
    }
  });
  for (int64_t part = 1; part < kParts; ++part) {
    for (int64_t bin = 0; bin < 1 << 16; ++bin) parts[0][bin] += parts[part][bin];
  }
  return parts[0];
}

// The bin that holds the k-th; `below` grows by what lies in the bins before it.
int64_t find_bin(const std::vector<int64_t>& bins, int64_t k, int64_t& below) {
  int64_t bin = 0;
  while (below + bins[bin] < k) below += bins[bin++];
  return bin;
}

Threshold kth_by_histogram(const std::vector<Chunk>& chunks, int64_t k) {
  Threshold found;
  const std::vector<int64_t> coarse = histogram(chunks, [](float x) { return int64_t{ordered(x) >> 16}; });
  const auto high = static_cast<uint32_t>(find_bin(coarse, k, found.less));
  const std::vector<int64_t> fine = histogram(chunks, [high](float x) {
    const uint32_t key = ordered(x);
    return key >> 16 == high ? int64_t{key & 0xffffu} : int64_t{-1};
  });
  const int64_t low = find_bin(fine, k, found.less);
  found.equal = fine[low];
  const uint32_t key = (high << 16) | static_cast<uint32_t>(low);
  const uint32_t bits = key ^ ((key >> 31) ? 0x80000000u : 0xffffffffu);
  std::memcpy(&found.value, &bits, 4);
  return found;
}

struct Collected {
  std::vector<BracketCount> counts;  // per chunk
  BracketCount total;
  std::vector<float> inside;
  bool complete = true;
  int64_t nan_in = -1;
};

Collected collect(const std::vector<Chunk>& chunks, Bracket bracket, bool keep_all, const ScanKernels& kernels) {
  const auto count = static_cast<int64_t>(chunks.size());
  Collected result;
  result.counts.resize(count);
  std::vector<int64_t> offset(count + 1, 0), capacity(count, 0);
  for (int64_t c = 0; c < count; ++c) {
    capacity[c] = keep_all ? chunks[c].n : chunks[c].n / 4;
    offset[c + 1] = offset[c] + capacity[c] + 16;
  }
  // Not a vector: most of it is never touched, and zeroing it would cost more than the pass.
  const std::unique_ptr<float[]> buffer(new float[offset[count]]);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      result.counts[c] = kernels.count_bracket(
          chunks[c].x, chunks[c].n, bracket.low, bracket.high, buffer.get() + offset[c], capacity[c]);
    }
  });
  for (int64_t c = 0; c < count; ++c) {
    const BracketCount& part = result.counts[c];
    result.total.less += part.less;
    result.total.at_low += part.at_low;
    result.total.interior += part.interior;
    result.total.at_high += part.at_high;
    if (part.nan && result.nan_in < 0) result.nan_in = chunks[c].tensor;
    result.complete = result.complete && part.interior <= capacity[c];
  }
  if (result.nan_in >= 0 || !result.complete) return result;
  result.inside.reserve(result.total.interior);
  for (int64_t c = 0; c < count; ++c) {
    const float* first = buffer.get() + offset[c];
    result.inside.insert(result.inside.end(), first, first + result.counts[c].interior);
  }
  return result;
}

}  // namespace

Threshold kth_smallest(const std::vector<Chunk>& chunks, int64_t k, const ScanKernels& kernels) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const int64_t total = count_of(chunks);
  const bool small = total <= 2 * kSample;
  Bracket bracket{-kInfinity, kInfinity};
  if (!small) {
    std::vector<float> sample = sample_of(chunks, total);
    if (!sample.empty()) bracket = bracket_of(sample, k, total);
  }
  Collected found = collect(chunks, bracket, small, kernels);
  Threshold answer;
  answer.nan_in = found.nan_in;
  if (answer.nan_in >= 0) return answer;
  const BracketCount& count = found.total;
  const int64_t rank = k - count.less;
  if (rank >= 1 && rank <= count.at_low) {
    answer.value = bracket.low;
    answer.less = count.less;
    answer.equal = count.at_low;
  } else if (rank > count.at_low && rank <= count.at_low + count.interior && found.complete) {
    answer = kth_of_buffer(std::move(found.inside), rank - count.at_low, kernels);
    answer.less += count.less + count.at_low;
  } else if (rank > count.at_low + count.interior && rank <= count.at_low + count.interior + count.at_high) {
    answer.value = bracket.high;
    answer.less = count.less + count.at_low + count.interior;
    answer.equal = count.at_high;
  } else {
    answer = kth_by_histogram(chunks, k);
  }
  return answer;
}

}  // namespace sparsebert
