// What the distillation losses share: which tokens count, and the gradient's place.

#pragma once

#include <cstdint>
#include <optional>

#include "scratch.h"
#include "tensors.h"

namespace sparsebert {

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

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  return std::vector<int64_t>(tensor.sizes().begin(), tensor.sizes().end());
}

}  // namespace sparsebert
