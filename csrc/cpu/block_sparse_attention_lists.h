// What a call of block-sparse attention names, checked: its lists of blocks, its sequences, its tensors of tokens.

#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "block_sparse_attention.h"
#include "tensors.h"

namespace sparsebert::block_attention {

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

// Shapes and dtypes; how many entries a row has is not checked yet.
Lists read_lists(
    const Tensor& columns, const Tensor& full_counts, const Tensor& counts, const std::optional<Tensor>& partial_bits,
    const std::vector<int64_t>& block, int64_t batch, int64_t heads);

// What the rows say: counts within their room, columns in range and ascending.
void check_rows(const Lists& lists, int64_t key_blocks);

Sequences read_sequences(
    const Tensor& q, const Tensor& k, const std::optional<Tensor>& key_mask, const std::optional<Tensor>& cu_seqlens,
    int64_t block_k);

// Checks that x is like q, but `length` tokens long.
Tokens tokens_of(const Tensor& x, const char* name, const Tensor& like, bool packed, int64_t length);

}  // namespace sparsebert::block_attention
