#include <immintrin.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <tuple>

#include "block_sparse_attention_lists.h"
#include "losses.h"
#include "scratch.h"

namespace sparsebert {
namespace {

#define SB_FILE "block_sparse_attention.inc"
#define SB_WITH_BF16
#include "each_isa.inc"

}  // namespace

namespace block_attention {
namespace {

Kernels kernels_for(ScalarType dtype) {
  const Isa isa = active_isa();
  if (dtype == ScalarType::BFloat16) {
    if (use_avx512_bf16()) return avx512_bf16::kKernels<uint16_t>;
    if (isa == Isa::avx512) return avx512::kKernels<uint16_t>;
    return isa == Isa::avx2 ? avx2::kKernels<uint16_t> : generic::kKernels<uint16_t>;
  }
  if (isa == Isa::avx512) return avx512::kKernels<float>;
  return isa == Isa::avx2 ? avx2::kKernels<float> : generic::kKernels<float>;
}

// One thread's memory.
class Workspace {
 public:
  Workspace(const Sequences& on, const Lists& lists, int64_t each, bool backward)
      : packed_(on.key_blocks),
        entries_(lists.longest + 1),
        at_(lists.longest + 1),
        scratch_(lay_out(on, lists, each, backward)) {
    float* at = scratch_.get();
    for (const auto& [place, floats] : parts_) {
      *place = at;
      at += floats;
    }
    memory.packed = packed_.data();
    memory.entries = entries_.data();
    memory.at = at_.data();
  }
  Workspace(const Workspace&) = delete;
  void forget() { std::fill(packed_.begin(), packed_.end(), 0); }
  Memory memory{};

 private:
  int64_t lay_out(const Sequences& on, const Lists& lists, int64_t each, bool backward) {
    Head h{};
    h.dim = on.dim;
    h.block_k = lists.block_k;
    const Sizes z = head_sizes(h, each);
    const int64_t scores = std::max(kScores, kRows * stride_of(z, lists.longest)), rows = kQueries * z.width;
    const int64_t transposed = on.key_blocks * z.transposed, values = on.key_blocks * z.rows;
    parts_ = {{&memory.keys_t, transposed}, {&memory.queries, rows}, {&memory.scores, scores}, {&memory.result, rows},
              {&memory.block, lists.block_k * on.dim}};
    if (backward) {
      const int64_t sums = on.key_blocks * lists.block_k * z.width;
      const std::vector<std::pair<float**, int64_t>> more = {
          {&memory.keys, values}, {&memory.values_t, transposed}, {&memory.grad_k, sums}, {&memory.grad_v, sums},
          {&memory.query_rows, rows}, {&memory.grads, rows}, {&memory.grad_rows, rows}, {&memory.grad_scores, scores},
          {&memory.along, scores / 2}, {&memory.delta, kQueries}};
      parts_.insert(parts_.end(), more.begin(), more.end());
    } else {
      parts_.push_back({&memory.values, values});
      parts_.push_back({&memory.share, kQueries});
    }
    int64_t total = 0;
    for (auto& part : parts_) total += part.second = padded(part.second);
    return total;
  }

  std::vector<std::pair<float**, int64_t>> parts_;
  std::vector<uint8_t> packed_;
  std::vector<Entry> entries_;
  std::vector<int64_t> at_;
  Scratch scratch_;
};

struct Call {
  Sequences on;
  Lists lists;
  Kernels kernels;
  Tokens q, k, v, out, grad_out, grad_q, grad_k, grad_v;
  float* lse;
  const float* grad_lse;
  float scale;

  Head head(int64_t b, int64_t h) const {
    const int64_t row = lists.offset(b, h), bytes = padded(lists.block_k) / 8;
    const int64_t kind = on.masked || on.packed() ? b * on.key_blocks : 0;
    const int64_t bits = row * lists.partial * lists.block_q * (lists.block_k / 8);
    // [B, H, Sq], or [H, tokens].
    const int64_t number = on.packed() ? h * on.starts.back() + on.starts[b] : (b * on.heads + h) * on.queries;
    return {q.at(on, b, h), k.at(on, b, h), v.at(on, b, h), q.row, k.row, v.row, on.queries_of(b), on.keys_of(b), on.dim,
            lists.block_q, lists.block_k, scale, lists.columns + row * lists.most, lists.full_counts + row,
            lists.counts + row, lists.most, lists.bits == nullptr ? nullptr : lists.bits + bits, lists.partial,
            on.states.data() + kind, on.keep.data() + kind * bytes, on.masked, out.at(on, b, h), out.row, lse + number,
            grad_out.data == nullptr ? nullptr : grad_out.at(on, b, h), grad_out.row,
            grad_lse == nullptr ? nullptr : grad_lse + number, grad_q.data == nullptr ? nullptr : grad_q.at(on, b, h),
            grad_k.data == nullptr ? nullptr : grad_k.at(on, b, h), grad_v.data == nullptr ? nullptr : grad_v.at(on, b, h),
            grad_q.row, grad_k.row, grad_v.row, nullptr};
  }
};

// [batch, heads, tokens, dim] that lies as [batch, tokens, heads, dim]: joining the heads then copies nothing.
Tensor tokens_outermost(const Tensor& like) {
  if (like.dim() == 3) return empty(sizes_of(like), like.scalar_type());
  const Tensor made = empty({like.size(0), like.size(2), like.size(1), like.size(3)}, like.scalar_type());
  return torch::stable::transpose(made, 1, 2);
}

// A piece of the work: one head's blocks [first, last), of queries in the forward, of keys in the backward.
struct Piece {
  int64_t batch, head, first, last, range;
};

// `shares` pieces a head, of nearly as many blocks each.
std::vector<Piece> pieces_of(const Call& call, int64_t shares, bool keys) {
  const Sequences& on = call.on;
  const int64_t size = keys ? call.lists.block_k : call.lists.block_q;
  std::vector<Piece> pieces;
  for (int64_t b = 0; b < on.batch; ++b) {
    const int64_t length = keys ? on.keys_of(b) : on.queries_of(b), blocks = (length + size - 1) / size;
    for (int64_t h = 0; h < on.heads; ++h) {
      for (int64_t s = 0; s < shares; ++s) {
        const Piece piece = {b, h, blocks * s / shares, blocks * (s + 1) / shares, s};
        // In the backward every range writes its part of grad_q, be it of no keys.
        if (piece.first < piece.last || keys) pieces.push_back(piece);
      }
    }
  }
  return pieces;
}

template <typename Do>
void each_piece(const Call& call, const std::vector<Piece>& pieces, bool backward, const Do& run) {
  std::atomic<size_t> next{0};
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t workers = std::min<int64_t>(threads, pieces.size());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    Workspace workspace(call.on, call.lists, call.kernels.each, backward);
    const Piece* last = nullptr;
    // Whoever is free takes the next piece: heads differ in how much they attend to.
    for (size_t i = next++; i < pieces.size(); i = next++) {
      const Piece& piece = pieces[i];
      // A forward goes on with the keys that it has packed; a backward's sums are of its own range.
      if (backward || last == nullptr || last->batch != piece.batch || last->head != piece.head) workspace.forget();
      last = &piece;
      run(piece, workspace.memory);
    }
  });
}

Call prepare(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& columns, const Tensor& full_counts,
    const Tensor& counts, const std::optional<Tensor>& partial_bits, const std::optional<Tensor>& key_mask,
    const std::optional<Tensor>& cu_seqlens, const std::vector<int64_t>& block, double scale) {
  STD_TORCH_CHECK(
      q.scalar_type() == ScalarType::Float || q.scalar_type() == ScalarType::BFloat16, "q: expected float32 or bfloat16");
  STD_TORCH_CHECK(block.size() == 2 && block[1] > 0 && block[1] <= 1024, "block: expected two sizes up to 1024");
  Call call{};
  call.on = read_sequences(q, k, key_mask, cu_seqlens, block[1]);
  const Sequences& on = call.on;
  call.lists = read_lists(columns, full_counts, counts, partial_bits, block, on.batch, on.heads);
  const int64_t rows = (on.queries + block[0] - 1) / block[0];
  // Sequences without padding take the lists' upper left part.
  STD_TORCH_CHECK(
      on.packed() ? call.lists.rows >= rows : call.lists.rows == rows, "columns: expected ", rows,
      " rows of blocks, got ", call.lists.rows);
  check_rows(call.lists, on.packed() ? std::numeric_limits<int32_t>::max() : on.key_blocks);
  const bool packed = on.packed();
  const int64_t keys = packed ? q.size(0) : on.keys;
  call.q = tokens_of(q, "q", q, packed, q.size(packed ? 0 : 2));
  call.k = tokens_of(k, "k", q, packed, keys);
  call.v = tokens_of(v, "v", q, packed, keys);
  call.kernels = kernels_for(q.scalar_type());
  call.scale = static_cast<float>(scale);
  return call;
}

std::tuple<Tensor, Tensor> forward(
    Tensor q, Tensor k, Tensor v, Tensor columns, Tensor full_counts, Tensor counts, std::optional<Tensor> partial_bits,
    std::optional<Tensor> key_mask, std::optional<Tensor> cu_seqlens, std::vector<Tensor> transposed,
    std::vector<int64_t> block, double scale) {
  Call call = prepare(q, k, v, columns, full_counts, counts, partial_bits, key_mask, cu_seqlens, block, scale);
  const Sequences& on = call.on;
  const Tensor out = tokens_outermost(q);
  const Tensor lse = on.packed() ? empty({on.heads, q.size(0)}, ScalarType::Float)
                                 : empty({on.batch, on.heads, on.queries}, ScalarType::Float);
  if (out.numel() == 0) return {out, lse};
  call.out = tokens_of(out, "out", q, on.packed(), q.size(on.packed() ? 0 : 2));
  call.lse = data<float>(lse);
  // Few pieces a head, so that its keys are packed once; more where a thread would be left without one.
  const int64_t heads = on.batch * on.heads, threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t shares = std::min(std::max<int64_t>(1, (3 * threads + heads - 1) / heads), call.lists.rows);
  each_piece(call, pieces_of(call, shares, false), false, [&](const Piece& piece, const Memory& memory) {
    call.kernels.forward(call.head(piece.batch, piece.head), piece.first, piece.last, memory);
  });
  return {out, lse};
}

void check_numbers(const Tensor& x, const char* name, const Sequences& on, const Tensor& q) {
  check_contiguous(x, name);
  const int64_t entries = on.packed() ? on.heads * q.size(0) : on.batch * on.heads * on.queries;
  STD_TORCH_CHECK(
      x.scalar_type() == ScalarType::Float && x.numel() == entries, name, ": expected ", entries, " float32, one a row");
}

std::tuple<Tensor, Tensor, Tensor> backward(
    Tensor grad_out, std::optional<Tensor> grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    Tensor columns, Tensor full_counts, Tensor counts, std::optional<Tensor> partial_bits,
    std::optional<Tensor> key_mask, std::optional<Tensor> cu_seqlens, std::vector<Tensor> transposed,
    std::vector<int64_t> block, double scale) {
  Call call = prepare(q, k, v, columns, full_counts, counts, partial_bits, key_mask, cu_seqlens, block, scale);
  const Sequences& on = call.on;
  const bool packed = on.packed();
  const int64_t queries = q.size(packed ? 0 : 2), keys = packed ? queries : on.keys;
  call.grad_out = tokens_of(grad_out, "grad_out", q, packed, queries);
  call.out = tokens_of(out, "out", q, packed, queries);
  check_numbers(lse, "lse", on, q);
  if (grad_lse) check_numbers(*grad_lse, "grad_lse", on, q);
  call.lse = const_cast<float*>(const_data<float>(lse));
  call.grad_lse = grad_lse ? const_data<float>(*grad_lse) : nullptr;
  const Tensor grad_q = tokens_outermost(q), grad_k = tokens_outermost(k), grad_v = tokens_outermost(v);
  call.grad_q = tokens_of(grad_q, "grad_q", q, packed, queries);
  call.grad_k = tokens_of(grad_k, "grad_k", q, packed, keys);
  call.grad_v = tokens_of(grad_v, "grad_v", q, packed, keys);
  const int64_t heads = on.batch * on.heads;
  if (heads == 0 || grad_q.numel() + grad_k.numel() == 0) return {grad_q, grad_k, grad_v};
  // A head's keys in ranges where there are few heads: by the shape and not by the threads, since sums depend on it.
  constexpr int64_t kEnough = 48;
  const int64_t ranges = std::max<int64_t>(1, std::min((kEnough + heads - 1) / heads, on.key_blocks));
  const int64_t part = on.queries * on.dim;  // floats of one range of one head
  const Scratch parts(ranges > 1 ? heads * ranges * part : 1);
  const auto parts_of = [&](int64_t b, int64_t h) { return parts.get() + (b * on.heads + h) * ranges * part; };
  each_piece(call, pieces_of(call, ranges, true), true, [&](const Piece& piece, const Memory& memory) {
    Head head = call.head(piece.batch, piece.head);
    if (ranges > 1) head.grad_q_part = parts_of(piece.batch, piece.head) + piece.range * head.queries * on.dim;
    call.kernels.backward(head, piece.first, piece.last, memory);
  });
  if (ranges > 1) {
    torch::stable::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / on.heads, h = i % on.heads;
        call.kernels.add_parts(call.head(b, h), parts_of(b, h), ranges);
      }
    });
  }
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace block_attention
}  // namespace sparsebert

STABLE_TORCH_LIBRARY_IMPL(sparsebert, CPU, m) {
  m.impl("block_sparse_attention", TORCH_BOX(&sparsebert::block_attention::forward));
  m.impl("block_sparse_attention_backward", TORCH_BOX(&sparsebert::block_attention::backward));
}
