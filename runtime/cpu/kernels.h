// The CPU kernels as their callers see them: raw pointers and sizes, no ONNX Runtime, no Python.
//
//   x [tokens, cols] float32, y [tokens, rows] float32, both row-major; bias [rows] float32 or null.
//   y = x W^T + bias for a sparse W [rows, cols], rows = out_features (N), cols = in_features (K).
//
// Weights are read in the layout of the file (ONNX Runtime maps it): nothing is repacked. values, indices and mask need
// no alignment, the other arrays that of their elements. Weights must have passed formats.h; the kernels do not check.
// A row of y is computed by one thread in a fixed order, so results do not depend on the number of threads.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparsify {

enum class DType : uint8_t { f32, f16, bf16, i8, i4 };

constexpr bool is_quantised(DType type) { return type == DType::i8 || type == DType::i4; }

constexpr size_t byte_size(DType type) { return type == DType::f32 ? 4 : type == DType::i8 ? 1 : 2; }  // not i4

// Bytes that `count` neighbouring values take; two 4-bit values share a byte, the first in the lower half.
constexpr int64_t stored_bytes(DType type, int64_t count) {
  return type == DType::f32 ? 4 * count : type == DType::i8 ? count : type == DType::i4 ? (count + 1) / 2 : 2 * count;
}

// bfloat16 weights: with more than two tokens, x may be rounded to bfloat16, and products of numbers below 2^-126 count as
// 0, where the processor has instructions for it (formats are the same everywhere).

// Quantised weights (i8, i4): W[n, k] = code * scale, code a signed integer; 4-bit codes are stored with 8 added.
//   i8   scales [rows] float32                         one for each row
//   i4   scales [rows, ceil(cols / group)] float16     one for each `group` neighbouring columns, group 32, 64 or 128
// Their activations are quantised as well, each token by itself, before anything is multiplied:
//   step = max |x| / 127,   code = x / step rounded to nearest, ties to even,   x is replaced by code * step.
// A step below the smallest normal float32 counts as 0, and so do the token's codes; a token with an infinity or a NaN
// gives NaN in every row.

// N:M, n kept of every m neighbours along cols.
//   values  [rows, cols / m * n]                 group after group, ascending position in a group
//                                                (i4: bytes [rows, ceil(cols / m * n / 2)])
//   indices [rows, ceil(cols / m * n * b / 8)]   position of each value in its group, b bits, lowest bits first
struct NmWeight {
  int64_t rows, cols;
  int n, m;
  DType type;
  const void* values;
  const uint8_t* indices;
  const void* scales;  // null unless quantised
  int64_t group;       // columns that share a scale; 0 unless i4

  int64_t kept_per_row() const { return cols / m * n; }
  int64_t value_bytes_per_row() const { return stored_bytes(type, kept_per_row()); }
  int index_bits() const { return m <= 2 ? 1 : m <= 4 ? 2 : m <= 16 ? 4 : 8; }
  int64_t index_bytes_per_row() const { return (kept_per_row() * index_bits() + 7) / 8; }
};

// Columns of a bitmask row whose 4-bit values begin on a byte of their own.
constexpr int64_t kNibbleColumns = 64;

// Unstructured: one bit a weight.
//   mask      [rows, ceil(cols / 8)]  bit k % 8 of byte k / 8 set = weight k is kept
//   values    [stored]                row after row, ascending k; stored = nnz, or for i4 bytes: two values each, every
//                                     64 columns of a row begin a new byte
//   row_start [rows + 1]              first element of `values` of each row, then their number
struct BitmaskWeight {
  int64_t rows, cols;
  DType type;
  const void* values;
  const uint8_t* mask;
  const int64_t* row_start;
  const void* scales;  // null unless quantised
  int64_t group;       // columns that share a scale; 0 unless i4

  int64_t mask_bytes_per_row() const { return (cols + 7) / 8; }
};

// Runs task(arg, 0) .. task(arg, count - 1), in any order, maybe at the same time; returns when all are done.
struct Parallel {
  void* context;
  void (*run)(void* context, size_t count, void (*task)(void* arg, size_t index), void* arg);
};

// Calls body(index) for index in [0, count).
template <class Body>
void parallel_for(const Parallel& parallel, int64_t count, Body& body) {
  if (count == 1) return body(int64_t{0});  // small layers: waking a thread costs more than the work
  if (count <= 0) return;
  parallel.run(
      parallel.context, size_t(count), [](void* arg, size_t index) { (*static_cast<Body*>(arg))(int64_t(index)); },
      &body);
}

// One instruction set's version of every op.
struct Kernels {
  const char* isa;
  void (*linear_nm)(const NmWeight&, const float* x, int64_t tokens, const float* bias, float* y, const Parallel&);
  void (*linear_bitmask)(const BitmaskWeight&, const float* x, int64_t tokens, const float* bias, float* y,
                         const Parallel&);
  // out[g * k2 + j] = sum over r of max(a[r * k1 + g], b[r * k2 + j]), added up in float64 (pairwise_max_sum.h).
  void (*pairwise_max_sum)(const float* a, const float* b, int64_t r, int64_t k1, int64_t k2, double* out,
                           const Parallel&);
  // What this machine can do, for tools/bench_kernels.py (roofline.h).
  float (*read_all)(const float* data, int64_t count, const Parallel&);
  int64_t (*fma_burst)(int64_t steps, const Parallel&);
  int64_t (*tile_burst)(DType, int64_t steps, const Parallel&);  // bf16 or i8; null without tiles
};

extern const Kernels kPortable;  // the oracle: plain loops
#ifdef SPARSIFY_X86
extern const Kernels kAvx2;
extern const Kernels kAvx512;      // F, BW, DQ, VL
extern const Kernels kAvx512Vnni;  // and VBMI, VBMI2, VNNI
extern const Kernels kAvx512Bf16;  // and BF16
extern const Kernels kAmx;         // and AMX TILE, BF16, INT8
extern const Kernels kAmxModel;    // the same with tiles in plain C++: for tests
#endif

// The fastest version this machine runs, chosen once. Null, with a sentence in *error, if the environment
// variable SPARSIFY_ISA (for tests only) names one that does not exist or that this machine lacks.
const Kernels* best_kernels(const char** error);

}  // namespace sparsify
