// AMX in the vocabulary of amx.h: eight tile registers of 16 rows by 64 bytes, and two products of them.
//
//   dp_bf16<c, a, b>   c[i][j] += sum over k of a[i][k] * b[k / 2][j][k % 2]    c float32, a and b bfloat16, k < 32
//   dp_i8<c, a, b>     c[i][j] += sum over k of a[i][k] * b[k / 4][j][k % 4]    c int32, a and b int8, k < 64
//
// bfloat16 products that are denormal count as 0, sums are rounded to nearest. With SPARSIFY_TILE_MODEL the same names
// come from tiles_model.h, plain C++ for machines that have no tiles.
//
// Written as assembly: GCC's intrinsics do not tell the compiler that a tile reads memory, so a store of the values that
// a tile is to load may be moved behind the load.
#pragma once
#include <cstdint>

#ifdef SPARSIFY_TILE_MODEL
#include "tiles_model.h"
#else

namespace sparsify { namespace {

constexpr int64_t kTileRows = 16, kTileRowBytes = 64, kTileBytes = kTileRows * kTileRowBytes;

// While it lives, this thread's tiles have their full size. Nothing else may use tiles on this thread meanwhile.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof config == 64, "what ldtilecfg reads");
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int t>
  static void zero() { asm volatile("tilezero %%tmm%c0" : : "n"(t)); }
  template <int t>
  static void load(const void* from, int64_t stride = kTileRowBytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "n"(t) : "memory");
  }
  template <int t>
  static void store(void* to) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(kTileRowBytes), "n"(t) : "memory");
  }
  template <int c, int a, int b>
  static void dp_bf16() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "n"(c), "n"(a), "n"(b)); }
  template <int c, int a, int b>
  static void dp_i8() { asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "n"(c), "n"(a), "n"(b)); }
};

}}  // namespace sparsify::
#endif
