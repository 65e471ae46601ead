// Quantised weights on processors with AVX-512 VBMI, VBMI2 and VNNI; everything else as on any AVX-512.
#include "decode_bits_i4.h"
#include "decode_i8.h"
#include "panel_i4.h"
#include "panel_i8.h"
#include "row_tasks.h"

namespace sparsify {
namespace {

constexpr int64_t kDecodeTokens = 8;     // bitmask, 4 bits
constexpr int64_t kDecodeTokens24 = 2;   // 2:4 in 8 bits: with more, panels are faster

// Calls run(scales to 128 columns, as a constant).
template <class Run>
void with_scales(int64_t group, const Run& run) {
  if (group == 128) return run(std::integral_constant<int, 1>());
  if (group == 64) return run(std::integral_constant<int, 2>());
  run(std::integral_constant<int, 4>());
}

template <DType type>
void decode_24(const NmWeight& w, const float* x, int64_t tokens, const float* bias, float* y, const Parallel& parallel) {
  const TokenCodes c = token_codes(x, tokens, w.cols, 128);
  with_scales(type == DType::i4 ? w.group : 128, [&](auto scales) {
    for_row_tasks(w.rows, weight_bytes(w), parallel, [&](int64_t first, int64_t last) {
      decode_i8_rows(tokens, w.rows, bias, y, first, last, [&](int64_t row, int64_t t, float add, float* to, auto count) {
        decode_24_row<type, scales, count>(w, row, c.codes.get() + t * c.stride, c.stride, c.steps.get() + t, add, to);
      });
    });
  });
}

void decode_bits(const BitmaskWeight& w, const float* x, int64_t tokens, const float* bias, float* y,
                 const Parallel& parallel) {
  const TokenCodes c = token_codes(x, tokens, w.cols, 128);
  for_row_tasks(w.rows, weight_bytes(w), parallel, [&](int64_t first, int64_t last) {
    decode_i8_rows(tokens, w.rows, bias, y, first, last, [&](int64_t row, int64_t t, float add, float* to, auto count) {
      decode_bits_row<count>(w, row, c.codes.get() + t * c.stride, c.stride, c.steps.get() + t, add, to);
    });
  });
}

void decode_bits_i4(const BitmaskWeight& w, const float* x, int64_t tokens, const float* bias, float* y,
                    const Parallel& parallel) {
  const TokenCodes c = token_codes(x, tokens, w.cols, 0);
  const Scratch<int32_t> offsets = offset_sums(c, tokens);
  with_scales(w.group, [&](auto scales) {
    for_row_tasks(w.rows, weight_bytes(w), parallel, [&](int64_t first, int64_t last) {
      decode_i8_rows(tokens, w.rows, bias, y, first, last, [&](int64_t row, int64_t t, float add, float* to, auto count) {
        decode_bits_i4_row<scales, count>(w, row, c.codes.get() + t * c.stride, offsets.get() + t * c.stride / 4, c.stride,
                                          c.steps.get() + t, add, to);
      });
    });
  });
}

void panels(const NmWeight& w, const float* x, int64_t tokens, const float* bias, float* y, const Parallel& parallel) {
  Scratch<float> steps = scratch<float>(tokens);
  auto measure = [&](int64_t token) { steps[token] = token_step<Avx512>(x + token * w.cols, w.cols); };
  parallel_for(parallel, tokens, measure);
  const PanelI8 codes{x, w.cols, steps.get()};
  Scratch<char> packed = scratch<char>(panel_layout<PanelI8>(tokens, w.cols).bytes());
  pack_panels(codes, tokens, w.cols, packed.get(), parallel);
  if (w.type == DType::i8) return linear_panels(codes, w, packed.get(), tokens, bias, y, parallel);
  linear_panels(PanelI4{codes}, w, packed.get(), tokens, bias, y, parallel);
}

void linear_nm(const NmWeight& w, const float* x, int64_t tokens, const float* bias, float* y, const Parallel& parallel) {
  if (w.rows == 0 || tokens == 0) return;
  if (w.n == 2 && w.m == 4 && w.type == DType::i8)
    return tokens <= kDecodeTokens24 ? decode_24<DType::i8>(w, x, tokens, bias, y, parallel)
                                     : panels(w, x, tokens, bias, y, parallel);
  if (w.n == 2 && w.m == 4 && w.type == DType::i4)
    return tokens <= kDecodeTokens ? decode_24<DType::i4>(w, x, tokens, bias, y, parallel)
                                   : panels(w, x, tokens, bias, y, parallel);
  kAvx512.linear_nm(w, x, tokens, bias, y, parallel);
}

void linear_bitmask(const BitmaskWeight& w, const float* x, int64_t tokens, const float* bias, float* y,
                    const Parallel& parallel) {
  if (w.rows == 0 || tokens == 0) return;
  if (w.type == DType::i8 && tokens <= kDecodeTokens) return decode_bits(w, x, tokens, bias, y, parallel);
  if (w.type == DType::i4 && tokens <= kDecodeTokens) return decode_bits_i4(w, x, tokens, bias, y, parallel);
  kAvx512.linear_bitmask(w, x, tokens, bias, y, parallel);
}

}  // namespace

extern const Kernels kAvx512Vnni;
const Kernels kAvx512Vnni = {"avx512vnni",
                             linear_nm,
                             linear_bitmask,
                             [](auto... a) { kAvx512.pairwise_max_sum(a...); },
                             [](auto... a) { return kAvx512.read_all(a...); },
                             [](auto... a) { return kAvx512.fma_burst(a...); },
                             nullptr};

}  // namespace sparsify
