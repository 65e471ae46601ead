// What the tile instructions of tiles.h mean, in plain C++, for machines without them and for the sanitizers, which do
// not see what an instruction reads. Used out of order (before they are configured, a register that is not there) it
// stops the program, as the processor does.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace sparsify { namespace {

constexpr int64_t kTileRows = 16, kTileRowBytes = 64, kTileBytes = kTileRows * kTileRowBytes;

class Tiles {
 public:
  Tiles() {
    if (on()) stop("tiles are configured twice");
    on() = true;
    std::memset(memory(0), 0, size_t(8 * kTileBytes));  // as configuring does
  }
  ~Tiles() { on() = false; }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int t>
  static void zero() { std::memset(tile<t>(), 0, size_t(kTileBytes)); }
  template <int t>
  static void load(const void* from, int64_t stride = kTileRowBytes) {
    for (int row = 0; row < 16; ++row)
      std::memcpy(tile<t>() + row * kTileRowBytes, static_cast<const char*>(from) + row * stride, size_t(kTileRowBytes));
  }
  template <int t>
  static void store(void* to) { std::memcpy(to, tile<t>(), size_t(kTileBytes)); }

  template <int c, int a, int b>
  static void dp_bf16() {
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) {
        float sum = at<float>(tile<c>(), i * 16 + j);
        for (int k = 0; k < 32; ++k)
          sum = add_product(sum, bf16(tile<a>(), i * 32 + k), bf16(tile<b>(), k / 2 * 32 + j * 2 + k % 2));
        std::memcpy(tile<c>() + (i * 16 + j) * 4, &sum, 4);
      }
  }
  template <int c, int a, int b>
  static void dp_i8() {
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) {
        uint32_t sum = at<uint32_t>(tile<c>(), i * 16 + j);  // wraps around
        for (int k = 0; k < 64; ++k)
          sum += uint32_t(at<int8_t>(tile<a>(), i * 64 + k) * at<int8_t>(tile<b>(), k / 4 * 64 + j * 4 + k % 4));
        std::memcpy(tile<c>() + (i * 16 + j) * 4, &sum, 4);
      }
  }

 private:
  static bool& on() {
    thread_local bool configured = false;
    return configured;
  }
  static unsigned char* memory(int t) {
    thread_local unsigned char tiles[8 * kTileBytes];
    return tiles + t * kTileBytes;
  }
  template <int t>
  static unsigned char* tile() {
    static_assert(t >= 0 && t < 8, "there are eight tiles");
    if (!on()) stop("tiles are used before they are configured");
    return memory(t);
  }
  template <class T>
  static T at(const unsigned char* tile, int index) {
    T value;
    std::memcpy(&value, tile + index * int(sizeof(T)), sizeof value);
    return value;
  }
  static float bf16(const unsigned char* tile, int index) {
    uint32_t bits = uint32_t(at<uint16_t>(tile, index)) << 16;
    if ((bits & 0x7f800000) == 0) bits &= 0x80000000;  // denormal: zero
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  static float add_product(float sum, float x, float y) { return __builtin_fmaf(x, y, sum); }
  [[noreturn]] static void stop(const char* why) {
    std::fprintf(stderr, "tile model: %s\n", why);
    std::abort();
  }
};

}}  // namespace sparsify::
