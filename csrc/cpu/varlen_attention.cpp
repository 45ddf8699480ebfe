#include <immintrin.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <memory>

#include "tensors.h"
#include "varlen_attention.h"

namespace sparsebert {
namespace {

#define SB_FILE "varlen_attention.inc"
#include "each_isa.inc"

}  // namespace

namespace attention {

extern const Kernels bf16_kernels;  // varlen_attention_bf16.cpp

namespace {

Kernels kernels_for(ScalarType dtype) {
  const Isa isa = active_isa();
  if (dtype == ScalarType::BFloat16) {
    if (use_avx512_bf16()) return bf16_kernels;
    if (isa == Isa::avx512) return avx512::kKernels<uint16_t>;
    return isa == Isa::avx2 ? avx2::kKernels<uint16_t> : generic::kKernels<uint16_t>;
  }
  if (isa == Isa::avx512) return avx512::kKernels<float>;
  return isa == Isa::avx2 ? avx2::kKernels<float> : generic::kKernels<float>;
}

void check_tokens(const Tensor& x, const char* name, const Tensor& q) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3, name, ": expected a CPU tensor [tokens, heads, dim]");
  STD_TORCH_CHECK(x.scalar_type() == q.scalar_type(), name, ": expected q's dtype");
  for (int64_t i = 0; i < 3; ++i) {
    STD_TORCH_CHECK(x.size(i) == q.size(i), name, ": expected q's shape, got size ", x.size(i), " at dimension ", i);
  }
  STD_TORCH_CHECK(x.stride(2) == 1 || x.size(2) <= 1 || x.numel() == 0, name, ": expected stride 1 along dim");
}

std::vector<int64_t> read_starts(const Tensor& starts, int64_t tokens) {
  check_contiguous(starts, "cu_seqlens");
  STD_TORCH_CHECK(starts.dim() == 1 && starts.size(0) >= 1, "cu_seqlens: expected [B + 1]");
  std::vector<int64_t> read(starts.size(0));
  if (starts.scalar_type() == ScalarType::Long) {
    std::copy_n(const_data<int64_t>(starts), read.size(), read.begin());
  } else {
    STD_TORCH_CHECK(starts.scalar_type() == ScalarType::Int, "cu_seqlens: expected int32 or int64");
    std::copy_n(const_data<int32_t>(starts), read.size(), read.begin());
  }
  STD_TORCH_CHECK(
      read.front() == 0 && read.back() == tokens && std::is_sorted(read.begin(), read.end()),
      "cu_seqlens: expected to ascend from 0 to ", tokens);
  return read;
}

// Few pieces for few threads, so that a head is packed once; more where a thread would be left without one.
std::vector<Piece> pieces_of(const std::vector<int64_t>& starts, int64_t heads, int64_t threads) {
  constexpr int64_t kMost = 42 * kRows, kLeast = 8 * kRows;
  int64_t rows = kMost, count = 0;
  for (; rows > kLeast; rows /= 2) {
    count = 0;
    for (size_t s = 0; s + 1 < starts.size(); ++s) count += heads * ((starts[s + 1] - starts[s] + rows - 1) / rows);
    if (count >= 3 * threads) break;
  }
  rows = (rows + kRows - 1) / kRows * kRows;
  std::vector<Piece> pieces;
  for (size_t s = 0; s + 1 < starts.size(); ++s) {
    const int64_t length = starts[s + 1] - starts[s];
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t first = 0; first < length; first += rows) {
        pieces.push_back({starts[s], length, head, first, std::min(rows, length - first)});
      }
    }
  }
  return pieces;
}

// One thread's memory, all of it in one 64-byte aligned allocation.
class Workspace {
 public:
  Workspace(int64_t longest, int64_t dim) {
    const int64_t length = padded(longest), width = padded(dim);
    const int64_t sizes[] = {length * width, length * width, kRows * length, kRows * width, kRows * kPadding};
    int64_t total = 0;
    for (const int64_t size : sizes) total += size;
    memory_.reset(static_cast<float*>(std::aligned_alloc(64, total * sizeof(float))));
    if (memory_ == nullptr) throw std::bad_alloc();
    float* at = memory_.get();
    float* parts[5];
    for (int i = 0; i < 5; ++i, at += sizes[i - 1]) parts[i] = at;
    buffers = {parts[0], parts[1], parts[2], parts[3], parts[4]};
  }
  Buffers buffers;

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
};

void run(const Call& call, const std::vector<Piece>& pieces, const Kernels& kernels, int64_t longest, int64_t threads) {
  std::atomic<size_t> next{0};
  const int64_t workers = std::min<int64_t>(threads, pieces.size());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    const Workspace memory(longest, call.dim);
    const Piece* packed = nullptr;
    // Whoever is free takes the next piece: sequences differ in length. A row's numbers do not depend on its piece.
    for (size_t i = next++; i < pieces.size(); i = next++) {
      const Piece& piece = pieces[i];
      if (packed == nullptr || packed->token != piece.token || packed->head != piece.head) {
        kernels.pack(call, piece, memory.buffers);
        packed = &piece;
      }
      kernels.attend(call, piece, memory.buffers);
    }
  });
}

Tensor varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, double scale) {
  STD_TORCH_CHECK(
      q.scalar_type() == ScalarType::Float || q.scalar_type() == ScalarType::BFloat16, "q: expected float32 or bfloat16");
  check_tokens(q, "q", q);
  check_tokens(k, "k", q);
  check_tokens(v, "v", q);
  const int64_t tokens = q.size(0), heads = q.size(1), dim = q.size(2);
  const std::vector<int64_t> starts = read_starts(cu_seqlens, tokens);
  Tensor out = empty({tokens, heads, dim}, q.scalar_type());
  if (out.numel() == 0) return out;
  int64_t longest = 0;
  for (size_t s = 0; s + 1 < starts.size(); ++s) longest = std::max(longest, starts[s + 1] - starts[s]);
  const Call call = {
      q.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), out.mutable_data_ptr(),
      q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), heads * dim,
      dim, static_cast<float>(scale)};
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  run(call, pieces_of(starts, heads, threads), kernels_for(q.scalar_type()), longest, threads);
  return out;
}

}  // namespace
}  // namespace attention
}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CPU, m) {
  m.impl("varlen_attention", TORCH_BOX(&sparsebert::attention::varlen_attention));
}
