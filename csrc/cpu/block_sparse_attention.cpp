#include "block_sparse_attention.h"

#include <immintrin.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <tuple>

#include "losses.h"
#include "scratch.h"
#include "tensors.h"

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

// The lists of blocks as they lie in memory: [batches or 1, heads or 1, rows, most].
struct Lists {
  const int32_t *columns, *full_counts, *counts;
  const uint8_t* bits;
  int64_t batches, heads, rows, most, partial, block_q, block_k;
  int64_t longest;  // the most entries of a row

  int64_t offset(int64_t batch, int64_t head) const {
    return ((batches == 1 ? 0 : batch) * heads + (heads == 1 ? 0 : head)) * rows;
  }
};

void check_rows(const Lists& lists, int64_t key_blocks) {
  const auto ascends = [](const int32_t* from, int64_t n) {
    for (int64_t i = 1; i < n; ++i) {
      if (from[i] <= from[i - 1]) return false;
    }
    return true;
  };
  for (int64_t row = 0; row < lists.batches * lists.heads * lists.rows; ++row) {
    const int64_t full = lists.full_counts[row], count = lists.counts[row];
    STD_TORCH_CHECK(full >= 0 && full <= count, "full_counts: expected between 0 and counts, got ", full);
    STD_TORCH_CHECK(count <= lists.most, "counts: expected at most ", lists.most, ", got ", count);
    STD_TORCH_CHECK(
        count - full <= lists.partial, "counts: expected at most ", lists.partial, " partial blocks, got ", count - full);
    const int32_t* columns = lists.columns + row * lists.most;
    for (int64_t i = 0; i < count; ++i) {
      STD_TORCH_CHECK(
          columns[i] >= 0 && columns[i] < key_blocks, "columns: expected between 0 and ", key_blocks - 1, ", got ",
          columns[i]);
    }
    STD_TORCH_CHECK(
        ascends(columns, full) && ascends(columns + full, count - full),
        "columns: expected ascending among the full and among the partial blocks");
  }
}

void check_ints(const Tensor& x, const char* name, const Tensor& columns) {
  check_contiguous(x, name);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int && x.dim() == 3, name, ": expected int32 like columns' rows");
  for (int64_t i = 0; i < 3; ++i) {
    STD_TORCH_CHECK(x.size(i) == columns.size(i), name, ": expected as many as columns has rows");
  }
}

Lists read_lists(
    const Tensor& columns, const Tensor& full_counts, const Tensor& counts, const std::optional<Tensor>& partial_bits,
    const std::vector<int64_t>& block, int64_t batch, int64_t heads) {
  STD_TORCH_CHECK(block.size() == 2, "block: expected two sizes, got ", block.size());
  for (const int64_t size : block) {
    STD_TORCH_CHECK(size > 0 && size <= 1024 && size % 8 == 0, "block: expected a multiple of 8 up to 1024, got ", size);
  }
  check_contiguous(columns, "columns");
  STD_TORCH_CHECK(
      columns.scalar_type() == ScalarType::Int && columns.dim() == 4, "columns: expected int32 [batch, heads, rows, L]");
  STD_TORCH_CHECK(
      (columns.size(0) == 1 || columns.size(0) == batch) && (columns.size(1) == 1 || columns.size(1) == heads),
      "columns: expected lists for 1 or ", batch, " batches and 1 or ", heads, " heads, got ", columns.size(0), " and ",
      columns.size(1));
  check_ints(full_counts, "full_counts", columns);
  check_ints(counts, "counts", columns);
  Lists lists = {const_data<int32_t>(columns), const_data<int32_t>(full_counts), const_data<int32_t>(counts),
                 nullptr, columns.size(0), columns.size(1), columns.size(2), columns.size(3), 0, block[0], block[1], 0};
  if (partial_bits) {
    check_contiguous(*partial_bits, "partial_bits");
    bool fits = partial_bits->scalar_type() == ScalarType::Byte && partial_bits->dim() == 6;
    for (int64_t i = 0; fits && i < 3; ++i) fits = partial_bits->size(i) == columns.size(i);
    fits = fits && partial_bits->size(4) == block[0] && partial_bits->size(5) == block[1] / 8;
    STD_TORCH_CHECK(fits, "partial_bits: expected uint8 [batch, heads, rows, P, ", block[0], ", ", block[1] / 8, "]");
    lists.bits = const_data<uint8_t>(*partial_bits);
    lists.partial = partial_bits->size(3);
  }
  for (int64_t row = 0; row < lists.batches * lists.heads * lists.rows; ++row) {
    lists.longest = std::max<int64_t>(lists.longest, lists.counts[row]);
  }
  return lists;
}

// Where the tokens of every sequence lie, and which keys count.
struct Sequences {
  std::vector<int64_t> starts;  // empty where every sequence has its place in a batch
  int64_t batch, heads, queries, keys, dim, key_blocks;  // the most queries and keys of a sequence
  std::vector<uint8_t> states, keep;  // one sequence's after the other's, or one for all
  bool masked = false;

  bool packed() const { return !starts.empty(); }
  int64_t queries_of(int64_t b) const { return packed() ? starts[b + 1] - starts[b] : queries; }
  int64_t keys_of(int64_t b) const { return packed() ? starts[b + 1] - starts[b] : keys; }
};

// Strides of a tensor of tokens, [batch, heads, tokens, dim] or [tokens, heads, dim].
struct Tokens {
  char* data;
  int64_t size, batch, head, row;

  char* at(const Sequences& on, int64_t b, int64_t h) const {
    return data + (on.packed() ? on.starts[b] * row + h * head : b * batch + h * head) * size;
  }
};

Tokens tokens_of(const Tensor& x, const char* name, const Tensor& like, bool packed, int64_t length) {
  const int64_t dims = packed ? 3 : 4;
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == dims, name, ": expected a CPU tensor of ", dims, " dimensions");
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, ": expected q's dtype");
  const int64_t tokens = packed ? 0 : 2, head = 1;
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t wanted = i == tokens ? length : like.size(i);
    STD_TORCH_CHECK(x.size(i) == wanted, name, ": expected size ", wanted, " at dimension ", i, ", got ", x.size(i));
  }
  STD_TORCH_CHECK(x.stride(dims - 1) == 1 || x.size(dims - 1) <= 1 || x.numel() == 0, name, ": expected stride 1 along dim");
  auto* data = static_cast<char*>(const_cast<void*>(x.const_data_ptr()));
  const int64_t size = x.scalar_type() == ScalarType::Float ? 4 : 2;
  return {data, size, packed ? 0 : x.stride(0), x.stride(head), x.stride(tokens)};
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

// States and bits of the keys of sequence b, from what the mask leaves and where the sequence ends.
void find_keys(Sequences& on, int64_t b, const uint8_t* mask, int64_t block_k) {
  const int64_t bytes = padded(block_k) / 8, keys = on.keys_of(b);
  uint8_t* states = on.states.data() + b * on.key_blocks;
  uint8_t* keep = on.keep.data() + b * on.key_blocks * bytes;
  for (int64_t block = 0; block < on.key_blocks; ++block, keep += bytes) {
    int64_t found = 0;
    for (int64_t i = 0; i < block_k && block * block_k + i < keys; ++i) {
      const int64_t key = block * block_k + i;
      if (mask != nullptr && !mask[b * keys + key]) continue;
      keep[i / 8] |= static_cast<uint8_t>(1u << (i % 8));
      ++found;
    }
    states[block] = found == 0 ? kNone : found == padded(block_k) ? kAll : kSome;
  }
}

Sequences read_sequences(
    const Tensor& q, const Tensor& k, const std::optional<Tensor>& key_mask, const std::optional<Tensor>& cu_seqlens,
    int64_t block_k) {
  Sequences on;
  const bool packed = cu_seqlens.has_value();
  STD_TORCH_CHECK(q.dim() == (packed ? 3 : 4), "q: expected ", packed ? "[tokens, heads, dim]" : "[B, H, Sq, dim]");
  STD_TORCH_CHECK(k.dim() == q.dim(), "k: expected ", q.dim(), " dimensions like q");
  on.heads = q.size(1);
  on.dim = q.size(q.dim() - 1);
  STD_TORCH_CHECK(on.dim >= 1 && on.dim <= 1024, "q: expected dim between 1 and 1024, got ", on.dim);
  if (packed) {
    STD_TORCH_CHECK(!key_mask.has_value(), "key_mask: expected None with cu_seqlens");
    on.starts = read_starts(*cu_seqlens, q.size(0));
    on.batch = static_cast<int64_t>(on.starts.size()) - 1;
    on.queries = 0;
    for (int64_t b = 0; b < on.batch; ++b) on.queries = std::max(on.queries, on.queries_of(b));
    on.keys = on.queries;
  } else {
    on.batch = q.size(0);
    on.queries = q.size(2);
    on.keys = k.size(2);
  }
  on.key_blocks = (on.keys + block_k - 1) / block_k;
  const uint8_t* mask = packed ? nullptr : mask_bytes(key_mask, "key_mask", on.batch * on.keys);
  on.masked = mask != nullptr;
  const int64_t kinds = on.masked || packed ? on.batch : 1;
  on.states.assign(kinds * on.key_blocks, kNone);
  on.keep.assign(kinds * on.key_blocks * (padded(block_k) / 8), 0);
  for (int64_t b = 0; b < kinds; ++b) find_keys(on, b, mask, block_k);
  return on;
}

// One thread's memory.
class Workspace {
 public:
  Workspace(const Sequences& on, const Lists& lists, int64_t each, bool backward)
      : packed_(on.key_blocks), entries_(lists.longest + 1), at_(lists.longest + 1), scratch_(lay_out(on, lists, each, backward)) {
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
