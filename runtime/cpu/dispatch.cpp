// Picks the instruction set, once per process.
//
// SPARSIFY_ISA=avx512bf16|avx512vnni|avx512|avx2|portable overrides the choice. It exists for the tests, which run every
// version that this machine can run; it is not a setting.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace sparsify {
namespace {

struct Choice {
  const Kernels* kernels;
  const char* error;
};

Choice choose() {
  const Kernels* candidates[5];  // fastest first
  int count = 0;
#ifdef SPARSIFY_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                    __builtin_cpu_supports("avx512vnni");
  if (vnni && __builtin_cpu_supports("avx512bf16")) candidates[count++] = &kAvx512Bf16;
  if (vnni) candidates[count++] = &kAvx512Vnni;
  if (avx512) candidates[count++] = &kAvx512;
  if (avx2) candidates[count++] = &kAvx2;
#endif
  candidates[count++] = &kPortable;

  const char* wanted = std::getenv("SPARSIFY_ISA");
  if (!wanted || !*wanted) return {candidates[0], nullptr};
  for (int i = 0; i < count; ++i)
    if (std::strcmp(candidates[i]->isa, wanted) == 0) return {candidates[i], nullptr};
  return {nullptr, "SPARSIFY_ISA must be avx512bf16, avx512vnni, avx512, avx2 or portable, and one that this machine has"};
}

}  // namespace

const Kernels* best_kernels(const char** error) {
  static const Choice choice = choose();
  if (error) *error = choice.error;
  return choice.kernels;
}

}  // namespace sparsify
