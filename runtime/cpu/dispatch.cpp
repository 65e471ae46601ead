// Picks the instruction set, once per process.
//
// SPARSIFY_ISA=amx|avx512bf16|avx512vnni|avx512|avx2|portable limits the choice to one of those that this machine has,
// and amx-model, which is never chosen by itself, runs the AMX kernels on a model of the tiles (tiles_model.h).
#include <cstdlib>
#include <cstring>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef SPARSIFY_X86
#include <cpuid.h>
#endif

#include "kernels.h"

namespace sparsify {
namespace {

struct Choice {
  const Kernels* kernels;
  const char* error;
};

#ifdef SPARSIFY_X86
// Linux gives a process the registers of the tiles only when asked, once, and may say no.
bool tiles_permitted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// CPUID leaf 7: AMX BF16, TILE and INT8 (compilers know the names only since GCC 11 and Clang 12).
bool has_tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kWanted = 1u << 22 | 1u << 24 | 1u << 25;
  return (d & kWanted) == kWanted && tiles_permitted();
}
#endif

Choice choose() {
  const Kernels* candidates[7];  // fastest first
  int count = 0;
#ifdef SPARSIFY_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                    __builtin_cpu_supports("avx512vnni");
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
  if (bf16 && has_tiles()) candidates[count++] = &kAmx;
  if (bf16) candidates[count++] = &kAvx512Bf16;
  if (vnni) candidates[count++] = &kAvx512Vnni;
  if (avx512) candidates[count++] = &kAvx512;
  if (avx2) candidates[count++] = &kAvx2;
#endif
  candidates[count++] = &kPortable;

  const char* wanted = std::getenv("SPARSIFY_ISA");
  if (!wanted || !*wanted) return {candidates[0], nullptr};
  for (int i = 0; i < count; ++i)
    if (std::strcmp(candidates[i]->isa, wanted) == 0) return {candidates[i], nullptr};
#ifdef SPARSIFY_X86
  if (bf16 && std::strcmp(kAmxModel.isa, wanted) == 0) return {&kAmxModel, nullptr};
#endif
  return {nullptr,
          "SPARSIFY_ISA must be amx, avx512bf16, avx512vnni, avx512, avx2, portable or amx-model, and one that this "
          "machine has"};
}

}  // namespace

const Kernels* best_kernels(const char** error) {
  static const Choice choice = choose();
  if (error) *error = choice.error;
  return choice.kernels;
}

}  // namespace sparsify
