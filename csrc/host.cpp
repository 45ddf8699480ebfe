// A module without torch: what this CPU can do and how the binaries were made. Read by `python -m sparsebert.info`.

#include <pybind11/pybind11.h>

#include <thread>

#include "cpu/isa.h"

namespace py = pybind11;

namespace {

py::dict cpu_features() {
  const sparsebert::CpuFeatures& f = sparsebert::cpu();
  py::dict d;
  d["avx2"] = f.avx2;
  d["fma"] = f.fma;
  d["f16c"] = f.f16c;
  d["avx512f"] = f.avx512f;
  d["avx512bw"] = f.avx512bw;
  d["avx512vl"] = f.avx512vl;
  d["avx512dq"] = f.avx512dq;
  d["avx512_bf16"] = f.avx512_bf16;
  d["avx512_vnni"] = f.avx512_vnni;
  d["amx_bf16"] = f.amx_bf16;
  d["amx_tile"] = f.amx_tile;
  return d;
}

const char* isa() {
  switch (sparsebert::active_isa()) {
    case sparsebert::Isa::avx512: return sparsebert::use_avx512_bf16() ? "avx512_bf16" : "avx512";
    case sparsebert::Isa::avx2: return "avx2";
    default: return "generic";
  }
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "CPU features and build information; no torch.";
  m.def("cpu_features", &cpu_features, "Instruction sets that CPU and operating system both have, name -> bool.");
  m.def("cpu_vendor", [] { return std::string(sparsebert::cpu().vendor); }, "CPUID's vendor word.");
  m.def("isa", &isa, "The instruction set the CPU kernels use: avx512_bf16, avx512, avx2 or generic.");
  m.def("hardware_threads", [] { return std::thread::hardware_concurrency(); }, "Threads the machine runs at once.");
  m.attr("compiler") = __VERSION__;
  m.attr("flags") = SB_FLAGS;
}
