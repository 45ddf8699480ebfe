// What the block-sparse attention kernels of every instruction set share: one head's problem, and a thread's memory.

#pragma once

#include <cstdint>

namespace sparsebert::block_attention {

constexpr int64_t kLanes = 16;    // key blocks' and heads' widths are padded to it: the widest vector
constexpr int kRows = 6;          // rows of a tile of products: 6 x 4 accumulators of 32 registers
constexpr int64_t kQueries = 72;  // at most so many queries at a time
constexpr int64_t kScores = int64_t{1} << 16;  // and so many scores: 256 KB of L2

inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Which keys of a block there are at all: none, every one (and the block fills its vectors), or those of `keep`.
enum State : uint8_t { kNone = 0, kAll = 1, kSome = 2 };

// One head of one sequence. Strides in elements; rows of q, k, v, out, grad_out are tokens, `dim` numbers side by side.
struct Head {
  const void *q, *k, *v;
  int64_t q_row, k_row, v_row;
  int64_t queries, keys, dim, block_q, block_k;
  float scale;
  // The lists of this head: by block of queries `most` columns, of them the first full_counts whole, up to counts partial.
  const int32_t *columns, *full_counts, *counts;
  int64_t most;
  const uint8_t* bits;  // [query blocks, partial, block_q, block_k / 8], or null
  int64_t partial;
  const uint8_t* states;  // by key block
  const uint8_t* keep;    // [key blocks, padded(block_k) / 8]: the keys there are
  bool masked;            // by a key_mask, so that a block may have holes; else it merely ends
  void* out;              // forward: written; backward: read
  int64_t out_row;
  float* lse;
  // Backward.
  const void* grad_out;
  int64_t grad_out_row;
  const float* grad_lse;  // or null
  void *grad_q, *grad_k, *grad_v;
  int64_t grad_q_row, grad_k_row, grad_v_row;
  float* grad_q_part;  // instead of grad_q, [queries, dim]: what this range of keys adds to it
};

// A key block that a block of queries attends to.
struct Entry {
  int64_t block;
  const uint8_t* bits;  // of the elements, or null
  const uint8_t* keep;  // of the keys, or null
};

// Sizes of a head in 32-bit units, each a float or, for the dot products of bf16, a pair.
struct Sizes {
  int64_t width;       // padded(dim): a row of values, and of results
  int64_t keys;        // padded(block_k): a row of a block's scores
  int64_t units;       // of the dim
  int64_t depth;       // of block_k
  int64_t transposed;  // of a packed block of keys
  int64_t rows;        // of a packed block of values
};

inline Sizes head_sizes(const Head& h, int64_t each) {
  Sizes z;
  z.width = padded(h.dim);
  z.keys = padded(h.block_k);
  z.units = each == 1 ? z.width : (h.dim + 1) / 2;
  z.depth = (h.block_k + each - 1) / each;
  z.transposed = z.units * z.keys;
  z.rows = z.depth * z.width;
  return z;
}

// Of one thread, 64-byte aligned each.
struct Memory {
  float *keys_t, *values;            // packed blocks: keys transposed, values as rows
  float *keys, *values_t;            // backward: the other way about
  float *grad_k, *grad_v;            // backward: sums, [key blocks][block_k][width]
  float *queries, *query_rows;       // a few queries; backward with pairs: in pairs of rows too
  float *grads, *grad_rows;          // backward: the gradients above them
  float *scores, *grad_scores;       // [queries][stride]
  float *along;                      // backward with pairs: the scores' gradients in bf16
  float *result;                     // [queries][width]
  float *share, *delta;              // a number a query
  float *block;                      // one block of k or v without what the mask leaves out
  uint8_t* packed;                   // by key block: whether it is
  Entry* entries;
  int64_t* at;                       // by entry: where its packed block begins
};

// The blocks in [first, last) that query block `row` attends to and that have keys; returns how many.
inline int64_t collect(const Head& h, int64_t row, int64_t first, int64_t last, Entry* entries) {
  const int32_t* columns = h.columns + row * h.most;
  const int64_t bits_row = (h.block_k + 7) / 8, keep_row = padded(h.block_k) / 8;
  int64_t n = 0;
  for (int64_t i = 0; i < h.counts[row]; ++i) {
    const int64_t block = columns[i];
    if (block < first || block >= last || h.states[block] == kNone) continue;
    const int64_t place = i - h.full_counts[row];
    entries[n++] = {
        block, place < 0 ? nullptr : h.bits + (row * h.partial + place) * h.block_q * bits_row,
        h.states[block] == kAll ? nullptr : h.keep + block * keep_row};
  }
  return n;
}

// Scores of a row of queries: one vector more, since rows a power of two apart would fall on each other in the cache.
inline int64_t stride_of(const Sizes& z, int64_t entries) { return entries * z.keys + kLanes; }

// Queries at a time: nearly equal shares of `rows`, each within the bounds above.
inline int64_t chunk_of(int64_t rows, int64_t stride) {
  int64_t most = kScores / stride;
  most = most < kRows ? kRows : most > kQueries ? kQueries : most;
  const int64_t shares = (rows + most - 1) / most;
  const int64_t chunk = ((rows + shares - 1) / shares + kRows - 1) / kRows * kRows;
  return chunk < most ? chunk : most / kRows * kRows;
}

struct Kernels {
  int64_t each;  // elements of a unit
  // Blocks of queries [first, last).
  void (*forward)(const Head&, int64_t first, int64_t last, const Memory&);
  // Every query against key blocks [first, last): their grad_k and grad_v whole, and what they add to grad_q.
  void (*backward)(const Head&, int64_t first, int64_t last, const Memory&);
  // grad_q from the parts of `ranges` ranges, [ranges][queries][dim].
  void (*add_parts)(const Head&, const float* parts, int64_t ranges);
};

}  // namespace sparsebert::block_attention
