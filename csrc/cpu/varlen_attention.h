// What the attention kernels of every instruction set share: the call, a piece of its work, and a thread's buffers.

#pragma once

#include <cstdint>

namespace sparsebert::attention {

// Sizes and strides in elements. Rows of q, k, v and out are tokens; a head's `dim` numbers lie side by side.
struct Call {
  const void *q, *k, *v;
  void* out;
  int64_t q_row, q_head, k_row, k_head, v_row, v_head, out_row;
  int64_t dim;
  float scale;
};

// Queries [first, first + rows) of one head of the sequence whose tokens are [token, token + length).
struct Piece {
  int64_t token, length, head, first, rows;
};

// Of one thread, 64-byte aligned; see `buffer_bytes`.
struct Buffers {
  void* keys;     // one head's keys, transposed and packed in panels
  void* values;   // its values, packed in panels
  float* scores;  // [kRows, padded length]; probabilities take their place
  void* queries;  // [kRows, padded dim]
  float* tile;    // [kRows, kPanel] of the result
};

constexpr int kRows = 6;         // queries that share a pass over the keys: 6 x 4 accumulators of 32 registers
constexpr int64_t kPadding = 64;  // lengths and dims are padded to it: the widest panel, 4 vectors of 16

inline int64_t padded(int64_t n) { return (n + kPadding - 1) / kPadding * kPadding; }

struct Kernels {
  // Fill buffers.keys and buffers.values for the piece's head.
  void (*pack)(const Call&, const Piece&, const Buffers&);
  // The piece's rows of the result, from packed keys and values.
  void (*attend)(const Call&, const Piece&, const Buffers&);
};

}  // namespace sparsebert::attention
