#include "block_sparse_attention_lists.h"

#include <algorithm>

#include "losses.h"

namespace sparsebert::block_attention {
namespace {

void check_ints(const Tensor& x, const char* name, const Tensor& columns) {
  check_contiguous(x, name);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int && x.dim() == 3, name, ": expected int32 like columns' rows");
  for (int64_t i = 0; i < 3; ++i) {
    STD_TORCH_CHECK(x.size(i) == columns.size(i), name, ": expected as many as columns has rows");
  }
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

}  // namespace

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

}  // namespace sparsebert::block_attention
