// y = x W^T + bias for one vector instruction set V: which kernel, and how the work is cut into tasks.
//
//   up to kDecodeTokens tokens    columns in the lanes (decode_nm.h, decode_bitmask.h): limited by memory
//   more                          tokens in the lanes (tile.h): limited by arithmetic
//
// The choice and the cuts depend on the shape only, never on the number of threads.
#pragma once
#include "decode_bitmask.h"
#include "decode_nm.h"
#include "pairwise_max_sum.h"
#include "roofline.h"
#include "tile.h"

namespace sparsify { namespace {

constexpr int64_t kDecodeTokens = 8;
// Bytes of weights that one task reads: a sixteenth of all, but not so little that a task is over at once, nor so much
// that threads wait for the last one.
constexpr int64_t kLeastTaskBytes = 48 << 10, kMostTaskBytes = 512 << 10;

// Calls decode(row, row_last) for tasks of whole groups of 4 rows.
template <class Decode>
void for_row_tasks(int64_t rows, int64_t weight_bytes, const Parallel& parallel, const Decode& decode) {
  const int64_t row_bytes = rows ? weight_bytes / rows + 1 : 1;
  int64_t bytes = weight_bytes / 16;
  bytes = bytes < kLeastTaskBytes ? kLeastTaskBytes : bytes > kMostTaskBytes ? kMostTaskBytes : bytes;
  int64_t per_task = (bytes / row_bytes + 3) / 4 * 4;
  if (per_task < 4) per_task = 4;
  auto task = [&](int64_t index) {
    const int64_t row = index * per_task;
    decode(row, row + per_task < rows ? row + per_task : rows);
  };
  parallel_for(parallel, (rows + per_task - 1) / per_task, task);
}

// Few tokens, any pattern: a row's kept values and the activations gathered for them.
template <class V, class Unpacker>
void decode_gather(const Unpacker& unpacker, int64_t length, int64_t rows, int64_t cols, const float* x,
                   int64_t tokens, const float* bias, float* y, int64_t row, int64_t row_last) {
  alignas(64) float weight[kMaxBlock + 32];
  alignas(64) uint32_t offset[kMaxBlock + 32];
  for (; row < row_last; ++row) {
    Cursor cursor = unpacker.begin(row);
    typename V::F sum[kDecodeTokens];
    for (int64_t t = 0; t < tokens; ++t) sum[t] = V::zero();
    for (int64_t at = 0; at < length; at += kMaxBlock) {
      const int64_t kept =
          unpacker.unpack(row, at, length - at < kMaxBlock ? length - at : kMaxBlock, cursor, weight, offset);
      for (int64_t i = 0; i < kept; i += V::kLanes) {
        const uint32_t bits = kept - i >= V::kLanes ? ~0u : (1u << (kept - i)) - 1;
        for (int64_t t = 0; t < tokens; ++t)
          sum[t] = V::fma_where(bits, V::load(weight + i), V::gather_where(bits, x + t * cols, V::load(offset + i)),
                                sum[t]);
      }
    }
    for (int64_t t = 0; t < tokens; ++t) y[t * rows + row] = V::sum(sum[t]) + (bias ? bias[row] : 0.0f);
  }
}

template <class V, DType type, int bits>
void linear_nm_typed(const NmWeight& w, const float* x, int64_t tokens, const float* bias, float* y,
                     const Parallel& parallel) {
  const int64_t kept = w.kept_per_row();
  const int64_t bytes = w.rows * (kept * int64_t(byte_size(type)) + w.index_bytes_per_row());
  if (tokens <= kDecodeTokens && can_decode_nm<V>(w)) {
    for_row_tasks(w.rows, bytes, parallel, [&](int64_t row, int64_t row_last) {
      decode_nm<V, type, bits>(w, x, tokens, bias, y, row, row_last);
    });
    return;
  }
  Scratch<uint32_t> base = scratch<uint32_t>(kept + V::kLanes);
  const auto make_unpacker = [&](uint32_t stride) {
    for (int64_t i = 0; i < kept; ++i) base[i] = uint32_t(i / w.n * w.m) * stride;
    for (int64_t i = kept; i < kept + V::kLanes; ++i) base[i] = 0;
    return NmUnpacker<V, type, bits>{w, base.get(), stride};
  };
  if (tokens <= kDecodeTokens) {
    const auto unpacker = make_unpacker(1);
    for_row_tasks(w.rows, bytes, parallel, [&](int64_t row, int64_t row_last) {
      decode_gather<V>(unpacker, kept, w.rows, w.cols, x, tokens, bias, y, row, row_last);
    });
    return;
  }
  linear_tiled<V>(make_unpacker, w.rows, w.cols, kept, double(w.n) / w.m, x, tokens, bias, y, parallel);
}

template <class V, DType type>
void linear_bitmask_typed(const BitmaskWeight& w, const float* x, int64_t tokens, const float* bias, float* y,
                          const Parallel& parallel) {
  const int64_t nnz = w.row_start[w.rows];
  if (tokens <= kDecodeTokens) {
    const int64_t bytes = nnz * int64_t(byte_size(type)) + w.rows * w.mask_bytes_per_row();
    for_row_tasks(w.rows, bytes, parallel, [&](int64_t row, int64_t row_last) {
      decode_bitmask<V, type>(w, x, tokens, bias, y, row, row_last);
    });
    return;
  }
  Scratch<uint32_t> base = scratch<uint32_t>(w.cols + V::kLanes);
  const auto make_unpacker = [&](uint32_t stride) {
    for (int64_t k = 0; k < w.cols + V::kLanes; ++k) base[k] = uint32_t(k) * stride;
    return BitmaskUnpacker<V, type>{w, base.get(), stride};
  };
  const double density = w.rows > 0 && w.cols > 0 ? double(nnz) / double(w.rows) / double(w.cols) : 1.0;
  linear_tiled<V>(make_unpacker, w.rows, w.cols, w.cols, density, x, tokens, bias, y, parallel);
}

template <class V, DType type>
void linear_nm_bits(const NmWeight& w, const float* x, int64_t tokens, const float* bias, float* y,
                    const Parallel& parallel) {
  switch (w.index_bits()) {
    case 1: return linear_nm_typed<V, type, 1>(w, x, tokens, bias, y, parallel);
    case 2: return linear_nm_typed<V, type, 2>(w, x, tokens, bias, y, parallel);
    case 4: return linear_nm_typed<V, type, 4>(w, x, tokens, bias, y, parallel);
    default: return linear_nm_typed<V, type, 8>(w, x, tokens, bias, y, parallel);
  }
}

template <class V>
void linear_nm(const NmWeight& w, const float* x, int64_t tokens, const float* bias, float* y,
               const Parallel& parallel) {
  if (w.rows == 0 || tokens == 0) return;
  switch (w.type) {
    case DType::f32: return linear_nm_bits<V, DType::f32>(w, x, tokens, bias, y, parallel);
    case DType::f16: return linear_nm_bits<V, DType::f16>(w, x, tokens, bias, y, parallel);
    case DType::bf16: return linear_nm_bits<V, DType::bf16>(w, x, tokens, bias, y, parallel);
    case DType::i8: case DType::i4: return;
  }
}

template <class V>
void linear_bitmask(const BitmaskWeight& w, const float* x, int64_t tokens, const float* bias, float* y,
                    const Parallel& parallel) {
  if (w.rows == 0 || tokens == 0) return;
  switch (w.type) {
    case DType::f32: return linear_bitmask_typed<V, DType::f32>(w, x, tokens, bias, y, parallel);
    case DType::f16: return linear_bitmask_typed<V, DType::f16>(w, x, tokens, bias, y, parallel);
    case DType::bf16: return linear_bitmask_typed<V, DType::bf16>(w, x, tokens, bias, y, parallel);
    case DType::i8: case DType::i4: return;
  }
}

template <class V>
constexpr Kernels make_kernels(const char* isa) {
  return {isa, linear_nm<V>, linear_bitmask<V>, pairwise_max_sum<V>, read_all<V>, fma_burst<V>};
}

}}  // namespace sparsify::
