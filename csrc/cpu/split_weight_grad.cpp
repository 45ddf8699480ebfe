// dscores = P∘W summed over each block, dweight = P∘mask, in one pass over P. Every sum is taken in an order fixed by
// the shape alone (rows in segments of at most kSegment, lanes, then segments), so the number of threads cannot show.

#include "split_weight_grad.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

namespace sparsebert {
namespace {

constexpr int64_t kTile = 2048;    // elements that stay in L1 between the two uses
constexpr int64_t kTask = 1 << 16;
constexpr int64_t kSegment = 32;   // rows summed in fp32 before the sum goes on in fp64

struct Split {
  Grid grid;
  Dtype p_dtype, w_dtype;
  const char* product;
  const char* weight;
  const uint8_t* bits;  // null where the weight needs no gradient
  float* score_grad;    // null where the scores need none
  char* weight_grad;
  const RowKernels* kernels;

  const char* product_at(int64_t i) const { return product + i * size_of(p_dtype); }
  const char* weight_at(int64_t i) const { return weight + i * size_of(w_dtype); }
  char* weight_grad_at(int64_t i) const { return weight_grad + i * size_of(w_dtype); }
};

void split_elementwise(const Split& s) {
  const int64_t total = s.grid.matrix_rows() * s.grid.matrix_cols();
  const int64_t tasks = (total + kTask - 1) / kTask;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    uint8_t keep[kTile];
    for (int64_t i = begin * kTask; i < std::min(end * kTask, total); i += kTile) {
      const int64_t n = std::min(kTile, total - i);
      if (s.score_grad != nullptr) {
        s.kernels->multiply(s.p_dtype, s.product_at(i), s.w_dtype, s.weight_at(i), s.score_grad + i, n);
      }
      if (s.bits != nullptr) {
        expand_bits(s.bits, i, n, keep);
        s.kernels->select(s.p_dtype, s.product_at(i), keep, s.w_dtype, s.weight_grad_at(i), n);
      }
    }
  });
}

// Eight sums side by side, then together: an order the compiler may vectorise without changing it.
double sum_run(const float* x, int64_t n) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int lane = 0; lane < 8; ++lane) lanes[lane] += x[i + lane];
  }
  for (; i < n; ++i) lanes[i & 7] += x[i];
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

void split_blocks(const Split& s) {
  const Grid& grid = s.grid;
  const int64_t cols = grid.matrix_cols();
  const int64_t per_row = (grid.height + kSegment - 1) / kSegment;  // segments of a grid row
  std::vector<double> partial(s.score_grad != nullptr ? grid.rows * per_row * grid.cols : 0);
  torch::stable::parallel_for(0, grid.rows * per_row, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(cols);
    std::vector<uint8_t> keep(cols + 8), scratch(grid.cols + 8);
    for (int64_t segment = begin; segment < end; ++segment) {
      const int64_t grid_row = segment / per_row;
      const int64_t first = grid_row * grid.height + segment % per_row * kSegment;
      const int64_t last = std::min(first + kSegment, (grid_row + 1) * grid.height);
      if (s.bits != nullptr) expand_row(s.bits, grid, grid_row, scratch.data(), keep.data());
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t at = first * cols; at < last * cols; at += cols) {
        if (s.score_grad != nullptr) {
          s.kernels->accumulate(s.p_dtype, s.product_at(at), s.w_dtype, s.weight_at(at), sum.data(), cols);
        }
        if (s.bits != nullptr) {
          s.kernels->select(s.p_dtype, s.product_at(at), keep.data(), s.w_dtype, s.weight_grad_at(at), cols);
        }
      }
      if (s.score_grad == nullptr) continue;
      for (int64_t j = 0; j < grid.cols; ++j) {
        partial[segment * grid.cols + j] = sum_run(sum.data() + j * grid.width, grid.width);
      }
    }
  });
  if (s.score_grad == nullptr) return;
  for (int64_t grid_row = 0; grid_row < grid.rows; ++grid_row) {
    for (int64_t j = 0; j < grid.cols; ++j) {
      double total = 0;
      for (int64_t part = 0; part < per_row; ++part) total += partial[(grid_row * per_row + part) * grid.cols + j];
      s.score_grad[grid_row * grid.cols + j] = static_cast<float>(total);
    }
  }
}

std::tuple<Tensor, Tensor> split_op(
    Tensor product, Tensor weight, std::optional<Tensor> bits, std::vector<int64_t> cells, bool need_scores,
    bool need_weight) {
  return split_weight_grad(product, weight, bits, cells, need_scores, need_weight, false);
}

}  // namespace

std::tuple<Tensor, Tensor> split_weight_grad(
    const Tensor& product, const Tensor& weight, const std::optional<Tensor>& bits, const std::vector<int64_t>& cells,
    bool need_scores, bool need_weight, bool consume) {
  check_contiguous(product, "product");
  check_contiguous(weight, "weight");
  const Grid grid = grid_on(weight, cells);
  STD_TORCH_CHECK(
      product.dim() == 2 && product.size(0) == weight.size(0) && product.size(1) == weight.size(1),
      "product: expected the shape of weight");
  STD_TORCH_CHECK(!need_weight || bits.has_value(), "bits: needed for the weight's gradient");
  if (need_weight) check_bits(*bits, grid.rows * grid.cols);
  const bool is_float = product.scalar_type() == ScalarType::Float;
  const bool own_weight = consume && need_weight && product.scalar_type() == weight.scalar_type();
  const bool own_scores = consume && need_scores && !need_weight && is_float && grid.elementwise();
  Tensor score_grad = own_scores    ? product
                      : need_scores ? empty({grid.rows, grid.cols}, ScalarType::Float)
                                    : empty({0}, ScalarType::Float);
  Tensor weight_grad = own_weight    ? product
                       : need_weight ? empty({weight.size(0), weight.size(1)}, weight.scalar_type())
                                     : empty({0}, weight.scalar_type());
  if (weight.numel() == 0) {
    // Cells of nothing.
    if (score_grad.numel() != 0) std::fill_n(data<float>(score_grad), score_grad.numel(), 0.0f);
    return {score_grad, weight_grad};
  }
  Split split{grid,
              dtype_of(product, "product"),
              dtype_of(weight, "weight"),
              static_cast<const char*>(product.const_data_ptr()),
              static_cast<const char*>(weight.const_data_ptr()),
              need_weight ? const_data<uint8_t>(*bits) : nullptr,
              need_scores ? data<float>(score_grad) : nullptr,
              need_weight ? static_cast<char*>(weight_grad.mutable_data_ptr()) : nullptr,
              &row_kernels(active_isa())};
  if (grid.elementwise()) split_elementwise(split);
  else split_blocks(split);
  return {score_grad, weight_grad};
}

}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CPU, m) {
  m.impl("split_weight_grad", TORCH_BOX(&sparsebert::split_op));
}
