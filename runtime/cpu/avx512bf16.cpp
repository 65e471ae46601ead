// bfloat16 2:4 weights on processors with AVX-512 BF16 as well; everything else as in avx512vnni.cpp.
#include "panel_bf16.h"

namespace sparsify {
namespace {

constexpr int64_t kDecodeTokens = 2;  // with so few, memory is the limit and the activations stay float32

void linear_nm(const NmWeight& w, const float* x, int64_t tokens, const float* bias, float* y, const Parallel& parallel) {
  if (w.n != 2 || w.m != 4 || w.type != DType::bf16 || tokens <= kDecodeTokens || w.rows == 0)
    return kAvx512Vnni.linear_nm(w, x, tokens, bias, y, parallel);
  const PanelBf16 element{x, w.cols};
  Scratch<char> packed = scratch<char>(panel_layout<PanelBf16>(tokens, w.cols).bytes());
  pack_panels(element, tokens, w.cols, packed.get(), parallel);
  linear_panels(element, w, packed.get(), tokens, bias, y, parallel);
}

}  // namespace

extern const Kernels kAvx512Bf16;
const Kernels kAvx512Bf16 = {"avx512bf16",
                             linear_nm,
                             [](auto... a) { kAvx512Vnni.linear_bitmask(a...); },
                             [](auto... a) { kAvx512.pairwise_max_sum(a...); },
                             [](auto... a) { return kAvx512.read_all(a...); },
                             [](auto... a) { return kAvx512.fma_burst(a...); },
                             nullptr};

}  // namespace sparsify
