// Working memory of the kernels.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

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

}  // namespace sparsebert
