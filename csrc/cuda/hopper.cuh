// What only Hopper has, a function to an instruction or two: barriers in shared memory that count bytes, copies that
// complete on them, blocks in clusters, and the sparse product of a warpgroup. Empty for other architectures.

#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "floats.h"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SB_HOPPER 1
#else
#define SB_HOPPER 0
#endif

namespace sparsebert::hopper {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

#if SB_HOPPER

// ---- Shared memory, by its address ----

__device__ inline uint32_t load_word(uint32_t from) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(from) : "memory");
  return word;
}
__device__ inline uint16_t load_half(uint32_t from) {
  uint16_t half;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(half) : "r"(from) : "memory");
  return half;
}
__device__ inline void store_half(uint32_t to, uint16_t half) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(half) : "memory");
}
__device__ inline void store_zeros(uint32_t to) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
}

// ---- Barriers ----

__device__ inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes barriers just made seen by the cluster's blocks and by copies.
__device__ inline void barriers_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, once `bytes` have come too.
__device__ inline void expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives at the same barrier of block `rank` of the cluster. It publishes nothing that was written: who arrives has
// read, and is done with it.
__device__ inline void arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Until the phase of this parity has ended. What never comes ends the launch with an error, after seconds.
__device__ inline void wait(uint32_t barrier, uint32_t parity) {
  for (uint32_t turn = 0;; ++turn) {
    uint32_t done = 0;
    asm volatile(
        "{\n.reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    if (done != 0) return;
    if (turn == 1u << 24) __trap();
  }
}

// ---- Clusters ----

// Until every thread of every block of the cluster has come here.
__device__ inline void cluster_meets() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// ---- Copies from device memory, by one thread: to the same place in the blocks of the cluster that `mask` names ----

// Whether that is one block, this one: it needs no other form, and other forms no cluster.
__device__ inline bool is_alone(uint16_t mask) { return (mask & (mask - 1)) == 0; }

__device__ inline void copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, uint16_t mask) {
  const auto address = static_cast<uint64_t>(__cvta_generic_to_global(from));
  if (is_alone(mask)) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
        "l"(address), "r"(bytes), "r"(barrier)
        : "memory");
    return;
  }
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
      "%4;" ::"r"(to),
      "l"(address), "r"(bytes), "r"(barrier), "h"(mask)
      : "memory");
}

// A box of a matrix from (row, col) on.
__device__ inline void copy_box(
    uint32_t to, const CUtensorMap& map, int32_t col, int32_t row, uint32_t barrier, uint16_t mask) {
  const auto address = reinterpret_cast<uint64_t>(&map);
  if (is_alone(mask)) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            to),
        "l"(address), "r"(col), "r"(row), "r"(barrier)
        : "memory");
    return;
  }
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, "
      "%3}], [%4], %5;" ::"r"(to),
      "l"(address), "r"(col), "r"(row), "r"(barrier), "h"(mask)
      : "memory");
}

// ---- Products ----

// What this thread has written to shared memory is seen by products from here on.
__device__ inline void written_for_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `kLeft` groups of products are under way. The sums pass through, so that nothing reads them before.
template <int kLeft>
__device__ inline void products_wait(float (&sum)[64]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
#pragma unroll
  for (int i = 0; i < 64; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

// Keeps a register as it is up to here.
__device__ inline void hold(uint32_t value) { asm volatile("" ::"r"(value) : "memory"); }

// sum[64 x 128] += sparse a[64 x 32] * b[32 x 128], by a warpgroup; `kHalf` says which threads hold the positions.
#define SB_EIGHT(i) \
  "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), "+f"(sum[i + 5]), \
      "+f"(sum[i + 6]), "+f"(sum[i + 7])
#define SB_SPARSE_PRODUCT(type)                                                                                      \
  asm volatile(                                                                                                      \
      "wgmma.mma_async.sp.sync.aligned.m64n128k32.f32." type "." type                                                \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "  \
      "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "    \
      "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, "   \
      "%65, %66, %67, 1, 1, 1, 0, 0;"                                                                                \
      : SB_EIGHT(0), SB_EIGHT(8), SB_EIGHT(16), SB_EIGHT(24), SB_EIGHT(32), SB_EIGHT(40), SB_EIGHT(48), SB_EIGHT(56) \
      : "l"(a), "l"(b), "r"(positions), "n"(kHalf)                                                                   \
      : "memory")

#define SB_DENSE_PRODUCT(type)                                                                                       \
  asm volatile(                                                                                                      \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                                   \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "  \
      "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "    \
      "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, "  \
      "%65, %66, %67}, %68, 1, 1, 1, 0;"                                                                             \
      : SB_EIGHT(0), SB_EIGHT(8), SB_EIGHT(16), SB_EIGHT(24), SB_EIGHT(32), SB_EIGHT(40), SB_EIGHT(48), SB_EIGHT(56) \
      : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "l"(b)                                       \
      : "memory")

// sum[64 x 128] += a[64 x 16] * b[16 x 128], a in the registers of a warpgroup.
template <Float kType>
__device__ inline void dense_product(float (&sum)[64], const Words& a, uint64_t b) {
  if constexpr (kType == Float::f16) SB_DENSE_PRODUCT("f16");
  else SB_DENSE_PRODUCT("bf16");
}

template <Float kType, int kHalf>
__device__ inline void sparse_product(float (&sum)[64], uint64_t a, uint64_t b, uint32_t positions) {
  if constexpr (kType == Float::f16) SB_SPARSE_PRODUCT("f16");
  else SB_SPARSE_PRODUCT("bf16");
}

#define SB_SHARED_PRODUCT(type)                                                                                      \
  asm volatile(                                                                                                      \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                                   \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "  \
      "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "    \
      "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, "   \
      "%65, 1, 1, 1, 0, 0;"                                                                                          \
      : SB_EIGHT(0), SB_EIGHT(8), SB_EIGHT(16), SB_EIGHT(24), SB_EIGHT(32), SB_EIGHT(40), SB_EIGHT(48), SB_EIGHT(56) \
      : "l"(a), "l"(b)                                                                                               \
      : "memory")

// The same, a in shared memory.
template <Float kType>
__device__ inline void dense_product(float (&sum)[64], uint64_t a, uint64_t b) {
  if constexpr (kType == Float::f16) SB_SHARED_PRODUCT("f16");
  else SB_SHARED_PRODUCT("bf16");
}

#undef SB_SHARED_PRODUCT
#undef SB_SPARSE_PRODUCT
#undef SB_DENSE_PRODUCT
#undef SB_EIGHT

#endif  // SB_HOPPER

}  // namespace sparsebert::hopper
