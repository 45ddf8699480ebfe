// P∘weight summed over blocks, and P∘mask (split_steps.h), in one pass over P.

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "launch.cuh"
#include "split_steps.h"

namespace sparsebert {
namespace {

constexpr int64_t kThreads = SplitTiles::kThreads;

__global__ void __launch_bounds__(kThreads) elements_kernel(const __grid_constant__ SplitJob job) {
  __shared__ SplitShared unused;
  DeviceBlock<SplitShared, kThreads> block{
      unused, nullptr, static_cast<int64_t>(blockIdx.x), static_cast<int64_t>(gridDim.x)};
  split_elements(block, job);
}

__global__ void __launch_bounds__(kThreads) tiles_kernel(const __grid_constant__ SplitJob job) {
  __shared__ SplitShared shared;
  DeviceBlock<SplitShared, kThreads> block{
      shared, nullptr, static_cast<int64_t>(blockIdx.x), static_cast<int64_t>(gridDim.x)};
  split_tiles(block, job);
}

__global__ void __launch_bounds__(kThreads) sums_kernel(const __grid_constant__ SplitJob job) {
  __shared__ SplitSumShared shared;
  DeviceBlock<SplitSumShared, kThreads> block{
      shared, nullptr, static_cast<int64_t>(blockIdx.x), static_cast<int64_t>(gridDim.x)};
  split_sums(block, job);
}

// The kernels stride over what this many blocks leave.
unsigned blocks_for(int64_t wanted) { return static_cast<unsigned>(std::min<int64_t>(wanted, int64_t{1} << 20)); }

void launch(const OnDevice& device, SplitJob job, const Tensor& like) {
  if (job.grid.elementwise()) {
    const int64_t units = units_for(job.grid.matrix_rows() * job.grid.matrix_cols());
    elements_kernel<<<blocks_for((units + kThreads - 1) / kThreads), kThreads, 0, device.stream()>>>(job);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return;
  }
  const SplitTiles shape(job.grid);
  const int64_t partials = job.score_grad != nullptr ? shape.partials(job.grid) : 0;
  const Tensor partial = empty_like(like, {partials}, ScalarType::Float);
  job.partial = partials > 0 ? static_cast<float*>(partial.mutable_data_ptr()) : nullptr;
  tiles_kernel<<<blocks_for(shape.tiles), kThreads, 0, device.stream()>>>(job);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (partials == 0) return;
  const int64_t cells = job.grid.rows * job.grid.cols, at_once = kThreads / SplitTiles::kThreadsPerCell;
  sums_kernel<<<blocks_for((cells + at_once - 1) / at_once), kThreads, 0, device.stream()>>>(job);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> split_weight_grad(
    Tensor product, Tensor weight, std::optional<Tensor> bits, std::vector<int64_t> cells, bool need_scores,
    bool need_weight) {
  check_cuda(weight, weight, "weight");
  check_cuda(product, weight, "product");
  STD_TORCH_CHECK(cells.size() == 2, "grid: expected two sizes, got ", cells.size());
  const Grid grid = grid_on(weight, cells[0], cells[1]);
  STD_TORCH_CHECK(
      product.dim() == 2 && product.size(0) == weight.size(0) && product.size(1) == weight.size(1),
      "product: expected the shape of weight");
  STD_TORCH_CHECK(!need_weight || bits.has_value(), "bits: needed for the weight's gradient");
  if (need_weight) check_bits(*bits, weight, grid.rows * grid.cols);
  SplitJob job{};
  job.grid = grid;
  job.product_type = float_type(product, "product");
  job.weight_type = float_type(weight, "weight");
  const OnDevice device(weight);
  const std::vector<int64_t> none{0};
  Tensor score_grad =
      empty_like(weight, need_scores ? std::vector<int64_t>{grid.rows, grid.cols} : none, ScalarType::Float);
  Tensor weight_grad = empty_like(
      weight, need_weight ? std::vector<int64_t>{weight.size(0), weight.size(1)} : none, weight.scalar_type());
  if (weight.numel() == 0 && score_grad.numel() != 0) {
    // Cells of nothing.
    STD_CUDA_CHECK(cudaMemsetAsync(
        score_grad.mutable_data_ptr(), 0, static_cast<size_t>(score_grad.numel()) * sizeof(float), device.stream()));
  }
  if (weight.numel() == 0 || !(need_scores || need_weight)) return {score_grad, weight_grad};
  job.product = product.const_data_ptr();
  job.weight = weight.const_data_ptr();
  job.bits = need_weight ? static_cast<const uint8_t*>(bits->const_data_ptr()) : nullptr;
  job.score_grad = need_scores ? static_cast<float*>(score_grad.mutable_data_ptr()) : nullptr;
  job.weight_grad = need_weight ? weight_grad.mutable_data_ptr() : nullptr;
  job.wide = (grid.elementwise() || grid.matrix_cols() % kUnit == 0) && aligned(job.product) && aligned(job.weight) &&
             aligned(job.score_grad) && aligned(job.weight_grad);
  launch(device, job, weight);
  return {score_grad, weight_grad};
}

}  // namespace
}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CUDA, m) {
  m.impl("split_weight_grad", TORCH_BOX(&sparsebert::split_weight_grad));
}
