// What may follow a linear layer's bias, in host code and device code alike.

#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include "grid.h"

namespace sparsebert {

// The order of ACTIVATIONS in sparsebert/ops/_linear.py.
enum class Epilogue : uint8_t { none, gelu, gelu_tanh, relu, tanh, unknown };

inline Epilogue epilogue_of(const std::string& name) {
  if (name == "none") return Epilogue::none;
  if (name == "gelu") return Epilogue::gelu;
  if (name == "gelu_tanh") return Epilogue::gelu_tanh;
  if (name == "relu") return Epilogue::relu;
  if (name == "tanh") return Epilogue::tanh;
  return Epilogue::unknown;
}

SB_HOST_DEVICE inline float activate(Epilogue epilogue, float x) {
  switch (epilogue) {
    case Epilogue::gelu: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case Epilogue::gelu_tanh: return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    // A NaN stays one.
    case Epilogue::relu: return x < 0.0f ? 0.0f : x;
    case Epilogue::tanh: return tanhf(x);
    default: return x;
  }
}

}  // namespace sparsebert
