// Scores to masks, exactly (select_steps.h): one cooperative launch for however many tensors, a block to a
// multiprocessor, and nothing that the host waits for unless it is asked for a verdict on NaNs.

#include <cooperative_groups.h>

#include <algorithm>
#include <vector>

#include "launch.cuh"
#include "select_steps.h"

namespace sparsebert {
namespace {

// As many as leave 96 registers to each: one block fills a multiprocessor.
constexpr int64_t kThreads = 640;
struct DeviceLaunch {
  using Block = DeviceBlock<SelectShared, kThreads>;
  Block block;

  template <typename F>
  SB_HOST_DEVICE void blocks(F&& step) {
    step(block);
  }
  SB_HOST_DEVICE void meet() {
#if defined(__CUDA_ARCH__)
    cooperative_groups::this_grid().sync();
#endif
  }
  SB_HOST_DEVICE Block& any() { return block; }
};

__global__ void __launch_bounds__(kThreads, 1)
    select_kernel(const __grid_constant__ SelectJob job) {
  extern __shared__ uint4 memory[];
  auto* bytes = reinterpret_cast<uint8_t*>(memory);
  DeviceLaunch launch{
      {*reinterpret_cast<SelectShared*>(bytes), reinterpret_cast<uint32_t*>(bytes + kSelectSharedBytes),
       static_cast<int64_t>(blockIdx.x), static_cast<int64_t>(gridDim.x)}};
  run_select(launch, job);
}

// A table of any length in device memory, a part of it with each launch: a copy from the host's memory would have to
// outlive a captured graph.
__global__ void table_kernel(const __grid_constant__ SelectJob part, SelectEntry* to) {
  to[threadIdx.x] = part.few[threadIdx.x];
}

std::vector<SelectEntry> entries_of(
    const std::vector<Tensor>& scores, const std::vector<Tensor>& weights, const std::vector<Tensor>& bits,
    const std::vector<Tensor>& out) {
  STD_TORCH_CHECK(scores.size() == bits.size(), "bits: expected one per score tensor");
  STD_TORCH_CHECK(weights.size() == out.size(), "out: expected one per weight");
  STD_TORCH_CHECK(weights.empty() || weights.size() == scores.size(), "weights: expected one per score tensor");
  std::vector<SelectEntry> entries;
  int64_t units = 0, matrix_units = 0;
  for (size_t t = 0; t < scores.size(); ++t) {
    check_cuda(scores[t], scores[0], "scores");
    STD_TORCH_CHECK(scores[t].scalar_type() == ScalarType::Float, "scores: expected float32");
    check_bits(bits[t], scores[0], scores[t].numel());
    SelectEntry entry{};
    entry.scores = static_cast<const float*>(scores[t].const_data_ptr());
    entry.count = scores[t].numel();
    entry.first_unit = units;
    entry.bits = static_cast<uint8_t*>(bits[t].mutable_data_ptr());
    entry.grid = Grid{1, entry.count, 1, 1};
    entry.first_matrix_unit = matrix_units;
    entry.wide_scores = aligned(entry.scores);
    if (!weights.empty()) {
      check_cuda(weights[t], scores[0], "weights");
      check_cuda(out[t], scores[0], "out");
      STD_TORCH_CHECK(scores[t].dim() == 2, "scores: expected a grid [GN, GK] on its weight");
      STD_TORCH_CHECK(out[t].numel() == weights[t].numel(), "out: expected the shape of its weight");
      entry.grid = grid_on(weights[t], scores[t].size(0), scores[t].size(1));
      entry.weight = weights[t].const_data_ptr();
      entry.weight_type = float_type(weights[t], "weights");
      entry.out = out[t].mutable_data_ptr();
      entry.out_type = float_type(out[t], "out");
      entry.wide_matrix = aligned(entry.weight) && aligned(entry.out);
    }
    units += units_for(entry.count);
    matrix_units += entry.matrix_units();
    entries.push_back(entry);
  }
  return entries;
}

int64_t blocks_for(const OnDevice& device, int64_t units) {
  // Fewer, where there is little to share: they have to wait for each other several times.
  constexpr int64_t kFewest = 256;
  const int64_t processors = device.attribute(cudaDevAttrMultiProcessorCount);
  const int64_t wanted = std::max<int64_t>(1, units / kFewest);
  return std::min({wanted, processors, SelectScratch::kMostBlocks});
}

void launch_select(const OnDevice& device, SelectJob job, const std::vector<SelectEntry>& entries, const Tensor& first) {
  constexpr int64_t kFew = SelectJob::kFew;
  const int64_t count = job.tensors;
  const Tensor many = empty_like(first, {count > kFew ? count * int64_t{sizeof(SelectEntry)} : 0}, ScalarType::Byte);
  if (count <= kFew) {
    std::copy(entries.begin(), entries.end(), job.few);
  } else {
    auto* to = static_cast<SelectEntry*>(many.mutable_data_ptr());
    for (int64_t at = 0; at < count; at += kFew) {
      const int64_t part = std::min(kFew, count - at);
      std::copy(entries.begin() + at, entries.begin() + at + part, job.few);
      table_kernel<<<1, static_cast<unsigned>(part), 0, device.stream()>>>(job, to + at);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    job.many = to;
  }
  const int64_t room = device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  job.capacity = (room - kSelectSharedBytes) / int64_t{kUnit * sizeof(uint32_t)} * kUnit;
  const int64_t shared = kSelectSharedBytes + job.capacity * int64_t{sizeof(uint32_t)};
  STD_CUDA_CHECK(
      cudaFuncSetAttribute(select_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  const auto blocks = static_cast<unsigned>(blocks_for(device, std::max(job.units, job.matrix_units)));
  void* arguments[] = {&job};
  STD_CUDA_CHECK(cudaLaunchCooperativeKernel(
      reinterpret_cast<const void*>(select_kernel), dim3(blocks), dim3(static_cast<unsigned>(kThreads)), arguments,
      static_cast<size_t>(shared), device.stream()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// A NaN is refused before this returns where only bits are asked for, or copies are written over their weights. Where
// copies are written elsewhere, as in each step of a training, nothing is waited for: they are all NaN then.
void run(
    SelectJob job, const std::vector<Tensor>& scores, const std::vector<Tensor>& weights,
    const std::vector<Tensor>& bits, const std::vector<Tensor>& out) {
  const std::vector<SelectEntry> entries = entries_of(scores, weights, bits, out);
  if (entries.empty()) return;
  job.tensors = static_cast<int64_t>(entries.size());
  job.units = entries.back().first_unit + units_for(entries.back().count);
  job.matrix_units = entries.back().first_matrix_unit + entries.back().matrix_units();
  int64_t total = 0;
  for (const SelectEntry& entry : entries) {
    total += entry.count;
    job.spare = job.spare || (entry.out != nullptr && entry.out == entry.weight);
  }
  STD_TORCH_CHECK(
      !job.by_rank || (job.rank >= 0 && job.rank <= total), "num_pruned: expected 0 to ", total, ", got ", job.rank);
  if (job.units == 0) return;
  const OnDevice device(scores[0]);
  const Tensor scratch = empty_like(scores[0], {int64_t{sizeof(SelectScratch)}}, ScalarType::Byte);
  job.scratch = static_cast<SelectScratch*>(scratch.mutable_data_ptr());
  launch_select(device, job, entries, scores[0]);
  if ((!weights.empty() && !job.spare) || device.capturing()) return;
  const auto nan = static_cast<int64_t>(device.read_word(&job.scratch->nan));
  STD_TORCH_CHECK(nan == 0, "scores[", job.tensors - nan, "]: has a NaN");
}

void select_mask(
    std::vector<Tensor> scores, int64_t num_pruned, std::vector<Tensor> weights, std::vector<Tensor> bits,
    std::vector<Tensor> out) {
  SelectJob job{};
  job.by_rank = true;
  job.rank = num_pruned;
  run(job, scores, weights, bits, out);
}

void threshold_mask(
    std::vector<Tensor> scores, double threshold, std::vector<Tensor> weights, std::vector<Tensor> bits,
    std::vector<Tensor> out) {
  SelectJob job{};
  job.limit = key_of(bits_of(float_below(threshold)));
  run(job, scores, weights, bits, out);
}

}  // namespace
}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CUDA, m) {
  m.impl("select_mask", TORCH_BOX(&sparsebert::select_mask));
  m.impl("threshold_mask", TORCH_BOX(&sparsebert::threshold_mask));
}
