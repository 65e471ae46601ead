// Quantised weights on processors with AVX-512 VBMI, VBMI2 and VNNI; everything else as on any AVX-512.
#include "decode_i8.h"
#include "panel_i8.h"
#include "row_tasks.h"

namespace sparsify {
namespace {

constexpr int64_t kDecodeTokens = 8;     // bitmask, 4 bits
constexpr int64_t kDecodeTokens24 = 2;   // 2:4 in 8 bits: with more, panels are faster

template <DType type, class Weight>
void decode(const Weight& w, int64_t group_columns, const float* x, int64_t tokens, const float* bias, float* y,
            const Parallel& parallel) {
  const TokenCodes codes = token_codes(x, tokens, w.cols);
  for_row_tasks(w.rows, weight_bytes(w), parallel, [&](int64_t row, int64_t row_last) {
    const int64_t scales = type == DType::i4 ? group_columns / w.group : 1;  // to a step
    if (scales <= 1) return decode_i8_rows<type, 1>(w, codes, tokens, bias, y, row, row_last);
    if (scales == 2) return decode_i8_rows<type, 2>(w, codes, tokens, bias, y, row, row_last);
    decode_i8_rows<type, 4>(w, codes, tokens, bias, y, row, row_last);
  });
}

void panels(const NmWeight& w, const float* x, int64_t tokens, const float* bias, float* y, const Parallel& parallel) {
  Scratch<float> steps = scratch<float>(tokens);
  auto measure = [&](int64_t token) { steps[token] = token_step<Avx512>(x + token * w.cols, w.cols); };
  parallel_for(parallel, tokens, measure);
  const PanelI8 element{x, w.cols, steps.get()};
  Scratch<char> packed = scratch<char>(panel_layout<PanelI8>(tokens, w.cols).bytes());
  pack_panels(element, tokens, w.cols, packed.get(), parallel);
  linear_panels(element, w, packed.get(), tokens, bias, y, parallel);
}

void linear_nm(const NmWeight& w, const float* x, int64_t tokens, const float* bias, float* y, const Parallel& parallel) {
  if (w.rows == 0 || tokens == 0) return;
  if (w.n == 2 && w.m == 4 && w.type == DType::i8)
    return tokens <= kDecodeTokens24 ? decode<DType::i8>(w, 128, x, tokens, bias, y, parallel)
                                     : panels(w, x, tokens, bias, y, parallel);
  if (w.n == 2 && w.m == 4 && w.type == DType::i4 && tokens <= kDecodeTokens)
    return decode<DType::i4>(w, 128, x, tokens, bias, y, parallel);
  kAvx512.linear_nm(w, x, tokens, bias, y, parallel);
}

void linear_bitmask(const BitmaskWeight& w, const float* x, int64_t tokens, const float* bias, float* y,
                    const Parallel& parallel) {
  if (w.rows == 0 || tokens == 0) return;
  if (w.type == DType::i8 && tokens <= kDecodeTokens) return decode<DType::i8>(w, 64, x, tokens, bias, y, parallel);
  if (w.type == DType::i4 && tokens <= kDecodeTokens) return decode<DType::i4>(w, 64, x, tokens, bias, y, parallel);
  kAvx512.linear_bitmask(w, x, tokens, bias, y, parallel);
}

}  // namespace

extern const Kernels kAvx512Vnni;
const Kernels kAvx512Vnni = {"avx512vnni",
                             linear_nm,
                             linear_bitmask,
                             [](auto... a) { kAvx512.pairwise_max_sum(a...); },
                             [](auto... a) { return kAvx512.read_all(a...); },
                             [](auto... a) { return kAvx512.fma_burst(a...); }};

}  // namespace sparsify
