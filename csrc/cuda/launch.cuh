// What every CUDA op does around its launches: checks of its tensors after Python's, the device, the stream.

#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

#include "floats.h"
#include "grid.h"

namespace sparsebert {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes a tensor's device the current one, and gives it back.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : device_(tensor.get_device_index()) {
    STD_CUDA_CHECK(cudaGetDevice(&before_));
    if (before_ != device_) STD_CUDA_CHECK(cudaSetDevice(device_));
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  ~OnDevice() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaStream_t stream() const { return stream_; }
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device_));
    return value;
  }
  // Whether a CUDA graph is being captured: then nothing may be waited for.
  bool capturing() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    STD_CUDA_CHECK(cudaStreamIsCapturing(stream_, &status));
    return status != cudaStreamCaptureStatusNone;
  }
  // A word of device memory, once all before it on the stream is done.
  uint64_t read_word(const void* from) const {
    uint64_t word = 0;
    STD_CUDA_CHECK(cudaMemcpyAsync(&word, from, sizeof(word), cudaMemcpyDeviceToHost, stream_));
    STD_CUDA_CHECK(cudaStreamSynchronize(stream_));
    return word;
  }

 private:
  int device_;
  int before_ = 0;
  cudaStream_t stream_ = nullptr;
};

// This block, as the bodies see it that run on the host too (blocks.h).
template <typename Shared, int64_t kSize>
struct DeviceBlock {
  static constexpr int64_t size = kSize;
  Shared& shared;
  uint32_t* keys;
  int64_t id;
  int64_t blocks;

  template <typename F>
  SB_HOST_DEVICE void threads(F&& step) {
#if defined(__CUDA_ARCH__)
    step(static_cast<int64_t>(threadIdx.x));
    __syncthreads();
#endif
  }
};

inline void check_cuda(const Tensor& tensor, const Tensor& first, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda(), name, ": expected a CUDA tensor");
  STD_TORCH_CHECK(tensor.get_device_index() == first.get_device_index(), name, ": expected on the device of the others");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

inline void check_bits(const Tensor& bits, const Tensor& first, int64_t entries) {
  check_cuda(bits, first, "bits");
  STD_TORCH_CHECK(
      bits.scalar_type() == ScalarType::Byte && bits.dim() == 1 && bits.size(0) == bytes_for(entries),
      "bits: expected uint8 [", bytes_for(entries), "], got ", bits.numel(), " entries");
}

inline Float float_type(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Float::f32;
    case ScalarType::BFloat16: return Float::bf16;
    case ScalarType::Half: return Float::f16;
    default: break;
  }
  STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  return Float::f32;
}

inline Grid grid_on(const Tensor& weight, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected [N, K], got ", weight.dim(), " dimensions");
  const int64_t n = weight.size(0), k = weight.size(1);
  const bool divides = rows > 0 ? n % rows == 0 : (rows == 0 && n == 0);
  const bool divides_cols = cols > 0 ? k % cols == 0 : (cols == 0 && k == 0);
  STD_TORCH_CHECK(divides && divides_cols, "grid: [", rows, ", ", cols, "] does not divide [", n, ", ", k, "]");
  return Grid{rows, cols, rows > 0 ? n / rows : 1, cols > 0 ? k / cols : 1};
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// A tensor that begins on 16 bytes: itself, or a copy.
inline Tensor on_sixteen(const Tensor& tensor) {
  if (aligned(tensor.const_data_ptr())) return tensor;
  return torch::stable::clone(tensor);
}

inline Tensor empty_like(const Tensor& first, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(first, sizes, dtype);
}

}  // namespace sparsebert
