// What the distillation losses share: which tokens count, and the gradient's place.

#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>

#include "tensors.h"

namespace sparsebert {

// Floats on a cache line's boundary, not initialised.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : memory_(static_cast<float*>(std::aligned_alloc(64, (static_cast<size_t>(floats) * 4 / 64 + 1) * 64))) {
    if (memory_ == nullptr) throw std::bad_alloc();
  }
  float* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
};

// The mask's bytes (0 or 1), or null where everything counts.
inline const uint8_t* mask_bytes(const std::optional<Tensor>& mask, const char* name, int64_t entries) {
  if (!mask) return nullptr;
  check_contiguous(*mask, name);
  STD_TORCH_CHECK(
      mask->scalar_type() == ScalarType::Bool && mask->numel() == entries, name, ": expected ", entries, " bools");
  return static_cast<const uint8_t*>(mask->const_data_ptr());
}

inline int64_t count_kept(const uint8_t* keep, int64_t entries) {
  if (keep == nullptr) return entries;
  int64_t kept = 0;
  for (int64_t i = 0; i < entries; ++i) kept += keep[i];
  return kept;
}

// float32 or bfloat16; fp16 is left to the reference.
inline Dtype loss_dtype(const Tensor& tensor, const char* name) {
  const Dtype dtype = dtype_of(tensor, name);
  STD_TORCH_CHECK(dtype != Dtype::f16, name, ": expected float32 or bfloat16");
  return dtype;
}

inline Tensor scalar(double value) {
  const Tensor out = empty({}, ScalarType::Float);
  *data<float>(out) = static_cast<float>(value);
  return out;
}

// A large tensor not yet written, in huge pages where the system gives them: faulting in 4 KiB at a time costs several
// times what the losses take to compute. Only a hint: nothing depends on it.
inline Tensor empty_large(std::vector<int64_t> sizes, ScalarType dtype) {
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const Tensor out = empty(std::move(sizes), dtype);
  const auto bytes = static_cast<uintptr_t>(out.numel()) * (dtype == ScalarType::Float ? 4 : 2);
  const auto start = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
  const uintptr_t first = (start + kHuge - 1) / kHuge * kHuge, last = (start + bytes) / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  return out;
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  return std::vector<int64_t>(tensor.sizes().begin(), tensor.sizes().end());
}

}  // namespace sparsebert
