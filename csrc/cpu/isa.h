// Which instructions this CPU has, asked at run time: one binary serves every x86-64 machine.
// No torch here: host.cpp uses it too.

#pragma once

#include <cpuid.h>
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace sparsebert {

struct CpuFeatures {
  bool avx2 = false, fma = false, f16c = false, bmi2 = false;
  bool avx512f = false, avx512bw = false, avx512vl = false, avx512dq = false;
  bool avx512_bf16 = false, avx512_vnni = false, amx_bf16 = false, amx_tile = false;
  char vendor[13] = {};
};

inline uint64_t enabled_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

inline CpuFeatures detect_cpu() {
  CpuFeatures f;
  uint32_t a, b, c, d;
  __cpuid(0, a, b, c, d);
  const uint32_t leaves = a;
  std::memcpy(f.vendor, &b, 4);
  std::memcpy(f.vendor + 4, &d, 4);
  std::memcpy(f.vendor + 8, &c, 4);
  __cpuid(1, a, b, c, d);
  const bool osxsave = c & (1u << 27);
  // A feature counts only where the operating system saves its registers.
  const uint64_t state = osxsave ? enabled_state() : 0;
  const bool ymm = (state & 0x6) == 0x6;
  const bool zmm = ymm && (state & 0xe0) == 0xe0;
  const bool tiles = (state & 0x60000) == 0x60000;
  f.fma = ymm && (c & (1u << 12));
  f.f16c = ymm && (c & (1u << 29));
  if (leaves < 7) return f;
  __cpuid_count(7, 0, a, b, c, d);
  const uint32_t subleaves = a;
  f.avx2 = ymm && (b & (1u << 5));
  f.bmi2 = b & (1u << 8);
  f.avx512f = zmm && (b & (1u << 16));
  f.avx512dq = zmm && (b & (1u << 17));
  f.avx512bw = zmm && (b & (1u << 30));
  f.avx512vl = zmm && (b & (1u << 31));
  f.avx512_vnni = zmm && (c & (1u << 11));
  f.amx_bf16 = tiles && (d & (1u << 22));
  f.amx_tile = tiles && (d & (1u << 24));
  if (subleaves >= 1) {
    __cpuid_count(7, 1, a, b, c, d);
    f.avx512_bf16 = zmm && (a & (1u << 5));
  }
  return f;
}

inline const CpuFeatures& cpu() {
  static const CpuFeatures features = detect_cpu();
  return features;
}

enum class Isa { generic, avx2, avx512 };

inline bool has(Isa isa) {
  const CpuFeatures& f = cpu();
  if (isa == Isa::avx512) return f.avx512f && f.avx512bw && f.avx512vl && f.avx512dq && f.avx2 && f.fma && f.bmi2;
  if (isa == Isa::avx2) return f.avx2 && f.fma && f.bmi2;
  return true;
}

// The widest this CPU has, or the one SPARSEBERT_ISA names. Read at each op so that a test can change it.
inline Isa active_isa() {
  const char* word = std::getenv("SPARSEBERT_ISA");
  if (word == nullptr || *word == 0) return has(Isa::avx512) ? Isa::avx512 : has(Isa::avx2) ? Isa::avx2 : Isa::generic;
  Isa isa;
  if (std::strcmp(word, "avx512") == 0 || std::strcmp(word, "avx512_bf16") == 0) isa = Isa::avx512;
  else if (std::strcmp(word, "avx2") == 0) isa = Isa::avx2;
  else if (std::strcmp(word, "generic") == 0) isa = Isa::generic;
  else throw std::runtime_error(std::string("SPARSEBERT_ISA: expected avx512_bf16, avx512, avx2 or generic, got ") + word);
  const bool lacks = !has(isa) || (std::strcmp(word, "avx512_bf16") == 0 && !cpu().avx512_bf16);
  if (lacks) throw std::runtime_error(std::string("SPARSEBERT_ISA=") + word + ": this CPU does not have it");
  return isa;
}

// Whether AVX-512's products of bf16 pairs may be used: the CPU has them, and SPARSEBERT_ISA does not name a lesser set.
inline bool use_avx512_bf16() {
  const char* word = std::getenv("SPARSEBERT_ISA");
  const bool free = word == nullptr || *word == 0 || std::strcmp(word, "avx512_bf16") == 0;
  return free && active_isa() == Isa::avx512 && cpu().avx512_bf16;
}

}  // namespace sparsebert

// Per-function targets instead of per-file flags: nothing that std:: instantiates can pick up instructions that the
// machine lacks. -march=native is never used.
#define SB_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,bmi2,popcnt")))
#define SB_TARGET_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,bmi2,popcnt")))
#define SB_TARGET_AVX2 __attribute__((target("avx2,fma,bmi2,popcnt")))
#define SB_TARGET_GENERIC
