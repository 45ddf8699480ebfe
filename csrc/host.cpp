// A module without torch: what this CPU can do and how the binaries were made, read by `python -m sparsebert.info`; and
// the CUDA kernels' bodies run on the host, for the tests.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "cpu/isa.h"
#include "emulate.h"
#include "emulate_bitmap.h"
#include "emulate_block_cluster.h"
#include "emulate_two_four.h"

namespace py = pybind11;

namespace {

py::dict cpu_features() {
  const sparsebert::CpuFeatures& f = sparsebert::cpu();
  py::dict d;
  d["avx2"] = f.avx2;
  d["fma"] = f.fma;
  d["f16c"] = f.f16c;
  d["avx512f"] = f.avx512f;
  d["avx512bw"] = f.avx512bw;
  d["avx512vl"] = f.avx512vl;
  d["avx512dq"] = f.avx512dq;
  d["avx512_bf16"] = f.avx512_bf16;
  d["avx512_vnni"] = f.avx512_vnni;
  d["amx_bf16"] = f.amx_bf16;
  d["amx_tile"] = f.amx_tile;
  return d;
}

const char* isa() {
  switch (sparsebert::active_isa()) {
    case sparsebert::Isa::avx512: return sparsebert::use_avx512_bf16() ? "avx512_bf16" : "avx512";
    case sparsebert::Isa::avx2: return "avx2";
    default: return "generic";
  }
}

using sparsebert::Float;
using sparsebert::Grid;
using Sizes = std::vector<int64_t>;

// The memory of anything with Python's buffer protocol (an array of NumPy, a bytearray), and how long it is.
template <typename T>
T* memory(const py::buffer& buffer, const char* name, int64_t count, bool written = false) {
  const py::buffer_info info = buffer.request(written);
  if (info.size * info.itemsize < count * static_cast<int64_t>(sizeof(T))) {
    throw py::value_error(std::string(name) + ": expected " + std::to_string(count) + " elements, got fewer");
  }
  return static_cast<T*>(info.ptr);
}

Float type_of(const py::buffer& buffer, const char* name) {
  const int64_t size = buffer.request().itemsize;
  if (size != 4 && size != 2) throw py::value_error(std::string(name) + ": expected float32, or bfloat16 as 16-bit words");
  return size == 4 ? Float::f32 : Float::bf16;
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

Grid grid_of(const Sizes& sizes) {
  if (sizes.size() != 4 || *std::min_element(sizes.begin(), sizes.end()) < 1) {
    throw py::value_error("grid: expected [rows, cols, height, width], all positive");
  }
  return Grid{sizes[0], sizes[1], sizes[2], sizes[3]};
}

int64_t emulate_select(
    const std::vector<py::buffer>& scores, const std::vector<py::buffer>& bits, std::optional<int64_t> num_pruned,
    double threshold, const std::vector<py::buffer>& weights, const std::vector<py::buffer>& out,
    const std::vector<Sizes>& grids, int64_t blocks, int64_t threads, int64_t capacity, bool backwards) {
  if (bits.size() != scores.size() || weights.size() != out.size() || grids.size() != out.size() ||
      (!out.empty() && out.size() != scores.size())) {
    throw py::value_error("bits, weights, out, grids: expected as many as scores, or none of the last three");
  }
  std::vector<sparsebert::SelectEntry> entries;
  for (size_t t = 0; t < scores.size(); ++t) {
    sparsebert::SelectEntry entry{};
    entry.count = scores[t].request().size;
    entry.scores = memory<float>(scores[t], "scores", entry.count);
    entry.bits = memory<uint8_t>(bits[t], "bits", sparsebert::bytes_for(entry.count), true);
    entry.wide_scores = aligned(entry.scores);
    entry.grid = Grid{1, entry.count, 1, 1};
    if (!out.empty()) {
      entry.grid = grid_of(grids[t]);
      if (entry.grid.rows * entry.grid.cols != entry.count) throw py::value_error("grids: expected a cell to a score");
      entry.weight_type = type_of(weights[t], "weights");
      entry.weight = memory<uint8_t>(weights[t], "weights", entry.matrix_size() * weights[t].request().itemsize);
      entry.out_type = type_of(out[t], "out");
      entry.out = memory<uint8_t>(out[t], "out", entry.matrix_size() * out[t].request().itemsize, true);
      entry.wide_matrix = aligned(entry.weight) && aligned(entry.out);
    }
    entries.push_back(entry);
  }
  sparsebert::SelectJob job{};
  job.by_rank = num_pruned.has_value();
  job.rank = num_pruned.value_or(0);
  job.limit = sparsebert::key_of(sparsebert::bits_of(sparsebert::float_below(threshold)));
  return sparsebert::emulate_select(job, entries, blocks, threads, capacity, backwards);
}

bool emulate_nm(
    const py::buffer& scores, const py::buffer& bits, int64_t n, int64_t m, std::optional<double> threshold,
    int64_t blocks, int64_t threads, bool backwards) {
  const int64_t count = scores.request().size;
  if (m < 1 || m > 32 || count % m != 0) throw py::value_error("m: expected 1 to 32, and whole groups of scores");
  sparsebert::NmJob job{};
  job.scores = memory<float>(scores, "scores", count);
  job.count = count;
  job.m = m;
  job.keep = n;
  job.limit = sparsebert::nm_limit(threshold);
  job.bits = memory<uint8_t>(bits, "bits", sparsebert::bytes_for(count), true);
  job.wide = aligned(job.scores);
  return sparsebert::emulate_nm(job, blocks, threads, backwards);
}

void emulate_split(
    const py::buffer& product, const py::buffer& weight, const py::buffer& bits, const Sizes& grid,
    const std::optional<py::buffer>& score_grad, const std::optional<py::buffer>& weight_grad, int64_t blocks,
    bool backwards) {
  sparsebert::SplitJob job{};
  job.grid = grid_of(grid);
  const int64_t cells = job.grid.rows * job.grid.cols, total = job.grid.matrix_rows() * job.grid.matrix_cols();
  job.product_type = type_of(product, "product");
  job.product = memory<uint8_t>(product, "product", total * product.request().itemsize);
  job.weight_type = type_of(weight, "weight");
  job.weight = memory<uint8_t>(weight, "weight", total * weight.request().itemsize);
  job.bits = memory<uint8_t>(bits, "bits", sparsebert::bytes_for(cells));
  if (score_grad) job.score_grad = memory<float>(*score_grad, "score_grad", cells, true);
  if (weight_grad) {
    job.weight_grad = memory<uint8_t>(*weight_grad, "weight_grad", total * weight.request().itemsize, true);
  }
  job.wide = (job.grid.elementwise() || job.grid.matrix_cols() % sparsebert::kUnit == 0) && aligned(job.product) && aligned(job.weight) &&
             aligned(job.weight_grad) && aligned(job.score_grad);
  sparsebert::emulate_split(job, blocks, backwards);
}

sparsebert::BitmapWeight bitmap_of(
    const py::buffer& values, const py::buffer& bits, const py::buffer& starts, int64_t n, int64_t k) {
  if (n < 1 || k < 1) throw py::value_error("n, k: expected positive sizes");
  sparsebert::BitmapWeight weight{};
  weight.n = n;
  weight.k = k;
  weight.nnz = values.request().size;
  weight.values = memory<uint16_t>(values, "values", weight.nnz);
  weight.bits = memory<uint32_t>(bits, "bits", weight.tiles() * sparsebert::kBitmapLanes);
  weight.starts = memory<int64_t>(starts, "starts", weight.tiles() + 1);
  return weight;
}

void emulate_bitmap_linear(
    const py::buffer& x, const py::buffer& values, const py::buffer& bits, const py::buffer& starts,
    const std::optional<py::buffer>& bias, const py::buffer& y, const Sizes& sizes, const std::string& activation,
    int64_t processors, bool backwards) {
  if (sizes.size() != 3 || sizes[0] < 1 || processors < 1) throw py::value_error("sizes: expected [M, N, K], positive");
  sparsebert::BitmapJob job{};
  job.m = sizes[0];
  job.weight = bitmap_of(values, bits, starts, sizes[1], sizes[2]);
  job.x = memory<uint16_t>(x, "x", job.m * job.weight.k);
  job.bias = bias ? memory<uint16_t>(*bias, "bias", job.weight.n) : nullptr;
  job.y = memory<uint16_t>(y, "y", job.m * job.weight.n, true);
  job.epilogue = sparsebert::epilogue_of(activation);
  job.wide = job.weight.k % sparsebert::kUnit == 0 && aligned(job.x);
  sparsebert::emulate_bitmap_linear(job, processors, backwards);
}

void emulate_bitmap_tiles(
    const py::buffer& values, const py::buffer& bits, const py::buffer& starts, const py::buffer& dense,
    const Sizes& shape, bool gather, bool backwards) {
  if (shape.size() != 2) throw py::value_error("shape: expected [N, K]");
  const sparsebert::BitmapWeight weight = bitmap_of(values, bits, starts, shape[0], shape[1]);
  uint16_t* matrix = memory<uint16_t>(dense, "dense", weight.n * weight.k, true);
  uint16_t* gathered = gather ? memory<uint16_t>(values, "values", weight.nnz, true) : nullptr;
  const bool wide = weight.k % sparsebert::kUnit == 0 && aligned(matrix);
  sparsebert::emulate_bitmap_tiles(weight, matrix, gathered, wide, backwards);
}

sparsebert::TwoFourShape two_four_shape(const Sizes& shape) {
  if (shape.size() != 2 || shape[0] < 1 || shape[1] < 4 || shape[1] % 4 != 0) {
    throw py::value_error("shape: expected [N, K], K a multiple of 4");
  }
  return {shape[0], shape[1]};
}

void emulate_two_four_pack(
    const py::buffer& values, const py::buffer& positions, const py::buffer& packed, const Sizes& shape) {
  sparsebert::TwoFourPack job{};
  job.shape = two_four_shape(shape);
  job.values = memory<uint16_t>(values, "values", job.shape.n * job.shape.k / 2);
  job.positions = memory<uint8_t>(positions, "positions", job.shape.n * ((job.shape.k / 4 + 1) / 2));
  job.packed = memory<uint8_t>(packed, "packed", job.shape.packed_bytes(), true);
  sparsebert::emulate_two_four_pack(job);
}

void emulate_two_four_linear(
    const py::buffer& x, const py::buffer& packed, const std::optional<py::buffer>& bias, const py::buffer& y,
    const Sizes& shape, const std::string& activation, const std::vector<py::buffer>& residue, const Sizes& cut) {
  sparsebert::TwoFourJob job{};
  job.shape = two_four_shape(shape);
  if (job.shape.n % 8 != 0 || job.shape.k % 8 != 0) throw py::value_error("shape: expected multiples of 8");
  job.m = x.request().size / job.shape.k;
  job.packed = memory<uint8_t>(packed, "packed", job.shape.packed_bytes());
  job.bias = bias ? memory<uint16_t>(*bias, "bias", job.shape.n) : nullptr;
  job.y = memory<uint16_t>(y, "y", job.m * job.shape.n, true);
  if (!residue.empty()) {
    if (residue.size() != 3 || cut.size() != 2) throw py::value_error("residue, cut: expected 3 buffers and 2 sizes");
    const int64_t groups = 2 * job.shape.row_tiles();
    job.residue.chunks = cut[0];
    job.residue.products = cut[1];
    job.residue.spans = memory<uint32_t>(residue[0], "spans", groups * job.shape.steps());
    job.residue.columns = memory<uint8_t>(residue[1], "columns", groups * cut[0] * 64);
    job.residue.values = memory<uint16_t>(residue[2], "values", groups * cut[0] * cut[1] * 1024);
  }
  sparsebert::emulate_two_four_linear(
      job, memory<uint16_t>(x, "x", job.m * job.shape.k), sparsebert::epilogue_of(activation));
}

Sizes emulate_block_cluster_linear(
    const py::buffer& x, const py::buffer& values, const py::buffer& columns, const py::buffer& row_starts,
    const std::optional<py::buffer>& bias, const py::buffer& y, const Sizes& shape, const std::string& activation,
    int64_t size) {
  const bool fits = (size == 64 || size == 128) && shape.size() == 2 && shape[0] > 0 && shape[1] > 0;
  if (!fits || shape[0] % size != 0 || shape[1] % size != 0) {
    throw py::value_error("shape, size: expected [N, K], multiples of 64 or 128");
  }
  sparsebert::BlockClusterJob job{};
  job.layer.shape = {shape[0], shape[1]};
  job.layer.m = x.request().size / shape[1];
  job.layer.bias = bias ? memory<uint16_t>(*bias, "bias", shape[0]) : nullptr;
  job.layer.y = memory<uint16_t>(y, "y", job.layer.m * shape[0], true);
  job.size = size;
  job.blocks = columns.request().size;
  job.columns = memory<int32_t>(columns, "columns", job.blocks);
  job.row_starts = memory<int32_t>(row_starts, "row_starts", shape[0] / size + 1);
  sparsebert::emulate_block_cluster_linear(
      job, memory<uint16_t>(x, "x", job.layer.m * shape[1]),
      memory<uint16_t>(values, "values", job.blocks * size * size), sparsebert::epilogue_of(activation));
  job.choose_cluster();
  return {job.layer.down, job.layer.across};
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "CPU features and build information; no torch.";
  m.def("cpu_features", &cpu_features, "Instruction sets that CPU and operating system both have, name -> bool.");
  m.def("cpu_vendor", [] { return std::string(sparsebert::cpu().vendor); }, "CPUID's vendor word.");
  m.def("isa", &isa, "The instruction set the CPU kernels use: avx512_bf16, avx512, avx2 or generic.");
  m.def("hardware_threads", [] { return std::thread::hardware_concurrency(); }, "Threads the machine runs at once.");
  m.def(
      "emulate_select", &emulate_select, py::arg("scores"), py::arg("bits"), py::arg("num_pruned"),
      py::arg("threshold"), py::arg("weights"), py::arg("out"), py::arg("grids"), py::arg("blocks"), py::arg("threads"),
      py::arg("capacity"), py::arg("backwards"),
      "The CUDA select_mask (threshold_mask where num_pruned is None) on buffers: the place of a tensor with a NaN, "
      "or -1.");
  m.def(
      "emulate_nm", &emulate_nm, py::arg("scores"), py::arg("bits"), py::arg("n"), py::arg("m"), py::arg("threshold"),
      py::arg("blocks"), py::arg("threads"), py::arg("backwards"),
      "The CUDA nm_mask on buffers: whether there is a NaN.");
  m.def(
      "emulate_split", &emulate_split, py::arg("product"), py::arg("weight"), py::arg("bits"), py::arg("grid"),
      py::arg("score_grad"), py::arg("weight_grad"), py::arg("blocks"), py::arg("backwards"),
      "The CUDA split_weight_grad on buffers; None for a result that is not wanted.");
  m.def(
      "emulate_bitmap_linear", &emulate_bitmap_linear, py::arg("x"), py::arg("values"), py::arg("bits"),
      py::arg("starts"), py::arg("bias"), py::arg("y"), py::arg("sizes"), py::arg("activation"), py::arg("processors"),
      py::arg("backwards"), "The CUDA bitmap_linear on buffers of bfloat16 words.");
  m.def(
      "emulate_bitmap_tiles", &emulate_bitmap_tiles, py::arg("values"), py::arg("bits"), py::arg("starts"),
      py::arg("dense"), py::arg("shape"), py::arg("gather"), py::arg("backwards"),
      "The CUDA bitmap_decode on buffers of 16-bit words, or bitmap_gather.");
  m.def(
      "emulate_two_four_pack", &emulate_two_four_pack, py::arg("values"), py::arg("positions"), py::arg("packed"),
      py::arg("shape"), "The CUDA semi_structured_pack on buffers.");
  m.def(
      "emulate_two_four_linear", &emulate_two_four_linear, py::arg("x"), py::arg("packed"), py::arg("bias"),
      py::arg("y"), py::arg("shape"), py::arg("activation"), py::arg("residue"), py::arg("cut"),
      "The CUDA semi_structured_packed_linear on buffers of bfloat16 words.");
  m.def(
      "emulate_block_cluster_linear", &emulate_block_cluster_linear, py::arg("x"), py::arg("values"),
      py::arg("columns"), py::arg("row_starts"), py::arg("bias"), py::arg("y"), py::arg("shape"),
      py::arg("activation"), py::arg("size"), "The CUDA block_cluster_linear on buffers; blocks of a cluster down and across.");
  m.def(
      "bitmap_plan",
      [](int64_t n, int64_t k, int64_t rows, int64_t processors) {
        const sparsebert::BitmapPlan plan = sparsebert::bitmap_plan(n, k, rows, processors);
        return Sizes{plan.row_tiles, plan.col_tiles, plan.per_block, plan.groups, plan.token_tiles, plan.splits};
      },
      "The plan of a CUDA bitmap_linear, in the order of the fields of kernels/_bitmap_costs.py's.");
  py::dict layout;
  layout["select_shared"] = sparsebert::kSelectSharedBytes;
  layout["split_segment"] = int64_t{sparsebert::SplitTiles::kSegment};
  layout["split_cols"] = int64_t{sparsebert::SplitTiles::kCols};
  m.attr("cuda_layout") = layout;
  m.attr("compiler") = __VERSION__;
  m.attr("flags") = SB_FLAGS;
}
