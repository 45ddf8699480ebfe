// How a score grid covers a matrix, for CPU and CUDA alike: entry (i, j) of a [rows, cols] grid decides the block of
// height x width weights at (i, j) of a [rows * height, cols * width] matrix. All arithmetic is 64-bit.

#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SB_HOST_DEVICE __host__ __device__
#else
#define SB_HOST_DEVICE
#endif

namespace sparsebert {

struct Grid {
  int64_t rows;
  int64_t cols;
  int64_t height;
  int64_t width;

  // The grid entry that decides matrix element (row, col).
  SB_HOST_DEVICE int64_t cell(int64_t row, int64_t col) const {
    return (row / height) * cols + col / width;
  }
  SB_HOST_DEVICE int64_t matrix_rows() const { return rows * height; }
  SB_HOST_DEVICE int64_t matrix_cols() const { return cols * width; }
  // One bit to a weight.
  SB_HOST_DEVICE bool elementwise() const { return height == 1 && width == 1; }
};

// Bits are row-major over the grid, least significant first; 1 is kept.
SB_HOST_DEVICE inline bool is_kept(const uint8_t* bits, int64_t cell) {
  return (bits[cell >> 3] >> (cell & 7)) & 1;
}

inline int64_t bytes_for(int64_t entries) { return (entries + 7) / 8; }

}  // namespace sparsebert
