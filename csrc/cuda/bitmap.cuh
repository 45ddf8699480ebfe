// A warp, as the bodies in bitmap.h see it, on the device; and the checks that the bitmap ops share.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <vector>

#include "bitmap.h"
#include "launch.cuh"

namespace sparsebert {

template <int T, Float kType>
struct DeviceBitmapWarp {
  BitmapLane<T> own;
  int64_t lane;

  __device__ explicit DeviceBitmapWarp(int64_t at) : lane(at) {}

  template <typename F>
  __device__ void lanes(F&& step) {
    step(lane, own);
  }
  __device__ void meet() { __syncwarp(); }

  __device__ void copy4(void* to, const void* from) {
    const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(from) : "memory");
  }
  // What is beyond `bytes` becomes 0 and is not read.
  __device__ void copy16(void* to, const void* from, uint32_t bytes) {
    const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
  }
  __device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
  // Until the oldest stage has come, for every lane.
  __device__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kBitmapStages - 2) : "memory");
    __syncwarp();
  }
  __device__ void wait_all() {
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncwarp();
  }

  // own.before: the values of the lanes before this one.
  __device__ void count_before() {
    const int count = __popc(own.bits);
    int sum = count;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += other;
    }
    own.before = sum - count;
  }

  // Group j of the tokens: 16 x 8 sums over the 64 columns.
  template <int A>
  __device__ void multiply(int j) {
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      float* c = own.sum[j];
      const uint32_t *a = own.words + 4 * s, *b = own.x[j % A] + 2 * s;
      if constexpr (kType == Float::bf16) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
      } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
      }
    }
  }
};

// The weight that checked tensors hold; `values` must outlive it.
inline BitmapWeight bitmap_weight(
    const void* values, int64_t nnz, const Tensor& bits, const Tensor& starts, const std::vector<int64_t>& shape,
    const Tensor& first) {
  constexpr int64_t kMost = int64_t{1} << 30;
  STD_TORCH_CHECK(
      shape.size() == 2 && shape[0] >= 0 && shape[1] >= 0 && shape[0] < kMost && shape[1] < kMost,
      "shape: expected [N, K], each below 2^30");
  BitmapWeight weight{};
  weight.n = shape[0];
  weight.k = shape[1];
  weight.nnz = nnz;
  check_cuda(bits, first, "bits");
  check_cuda(starts, first, "starts");
  STD_TORCH_CHECK(
      bits.scalar_type() == ScalarType::Int && bits.dim() == 3 && bits.size(0) == weight.row_tiles() &&
          bits.size(1) == weight.col_tiles() && bits.size(2) == kBitmapLanes,
      "bits: expected int32 [", weight.row_tiles(), ", ", weight.col_tiles(), ", ", kBitmapLanes, "]");
  STD_TORCH_CHECK(
      starts.scalar_type() == ScalarType::Long && starts.dim() == 1 && starts.size(0) == weight.tiles() + 1,
      "starts: expected int64 [", weight.tiles() + 1, "]");
  weight.values = static_cast<const uint16_t*>(values);
  weight.bits = static_cast<const uint32_t*>(bits.const_data_ptr());
  weight.starts = static_cast<const int64_t*>(starts.const_data_ptr());
  return weight;
}

inline void check_sixteen_bits(const Tensor& tensor, const char* name) {
  const bool is = tensor.scalar_type() == ScalarType::BFloat16 || tensor.scalar_type() == ScalarType::Half;
  STD_TORCH_CHECK(is, name, ": expected bfloat16 or float16");
}

// The dense weight [N, K] into `dense`, on the current device's stream.
void write_dense(const BitmapWeight& weight, uint16_t* dense, cudaStream_t stream);

}  // namespace sparsebert
