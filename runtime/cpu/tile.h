// Many tokens: y = x W^T with the tokens in the lanes.
//
//   x is transposed once into tiles   tile[k][token]   of up to 8 vectors of tokens
//   a row of W is unpacked once into  weight[i], offset[i]
//   and then, for each kept weight:   sum[token] += weight[i] * tile[offset[i]][token]
//
// Only kept weights cost anything, whatever the pattern: one broadcast, and an FMA per vector whose memory operand is
// the row that the index names. Both operands come from the level 1 cache: W is cut along K into blocks whose part of
// the tile is 32 KiB, and a block of the tile is used for all rows of a chunk before the next one is touched.
// Lists are padded to a whole number of accumulators with weight 0 at an extra row of zeros behind the tile (any other
// row could hold an infinity).
#pragma once
#include <cstdlib>
#include <memory>
#include <new>

#include "kept_list.h"
#include "unrolled.h"

namespace sparsify { namespace {

constexpr int kTileVectors = 8;
constexpr int64_t kChunkRows = 64;    // rows of W that share a block of a tile while it is in cache
constexpr int64_t kGroupTiles = 4;    // tiles that share one unpacking of a chunk
constexpr int64_t kMaxBlock = 512;    // columns, or kept values, in a block
constexpr int64_t kPanelTokens = 1024;  // tokens transposed at a time: bounds the scratch memory

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Scratch = std::unique_ptr<T[], FreeDeleter>;

template <class T>
Scratch<T> scratch(int64_t count) {
  const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
  void* memory = std::aligned_alloc(64, bytes ? bytes : 64);
  if (!memory) throw std::bad_alloc();
  return Scratch<T>(static_cast<T*>(memory));
}

// c[token] (+)= sum of weight[i] * x[offset[i]][token] for T vectors of tokens. Accumulator i % A takes weight i, so
// that enough FMAs are in flight when T is small. count % A == 0.
template <class V, int T>
void tile_row(const float* weight, const uint32_t* offset, int64_t count, const float* x, float* c, bool first) {
  constexpr int A = V::kAccumulators / T >= 8 ? 8 : V::kAccumulators / T >= 4 ? 4 : V::kAccumulators / T >= 2 ? 2 : 1;
  typename V::F sum[A][T];
  unrolled<T>([&](auto t) SPARSIFY_INLINE {
    sum[0][t] = first ? V::zero() : V::load(c + t * V::kLanes);
    unrolled<A - 1>([&](auto a) SPARSIFY_INLINE { sum[a + 1][t] = V::zero(); });
  });
  for (int64_t i = 0; i < count; i += A)
    unrolled<A>([&](auto a) SPARSIFY_INLINE {
      const typename V::F w = V::broadcast(weight[i + a]);
      const float* row = x + offset[i + a];
      unrolled<T>([&](auto t) SPARSIFY_INLINE { sum[a][t] = V::fma(w, V::load(row + t * V::kLanes), sum[a][t]); });
    });
  unrolled<T>([&](auto t) SPARSIFY_INLINE {
    unrolled<A - 1>([&](auto a) SPARSIFY_INLINE { sum[0][t] = V::add(sum[0][t], sum[a + 1][t]); });
    V::store(c + t * V::kLanes, sum[0][t]);
  });
}

using TileRow = void (*)(const float*, const uint32_t*, int64_t, const float*, float*, bool);
template <class V>
constexpr TileRow kTileRow[kTileVectors] = {tile_row<V, 1>, tile_row<V, 2>, tile_row<V, 3>, tile_row<V, 4>,
                                            tile_row<V, 5>, tile_row<V, 6>, tile_row<V, 7>, tile_row<V, 8>};

// How `tokens` tokens are cut into tiles: all of the same width but the last.
template <class V>
struct Tiles {
  int64_t tokens, cols;

  static constexpr int64_t kWidth = kTileVectors * V::kLanes;
  int64_t count() const { return (tokens + kWidth - 1) / kWidth; }
  int vectors(int64_t tile) const {
    const int64_t left = tokens - tile * kWidth;
    return left >= kWidth ? kTileVectors : int((left + V::kLanes - 1) / V::kLanes);
  }
  // A tile is [cols + 1][width]; the last row is zeros. Narrow tiles keep the full stride of the list's offsets.
  int64_t stride() const { return int64_t(vectors(0)) * V::kLanes; }
  int64_t tile_floats() const { return (cols + 1) * stride(); }
};

// Columns first .. last of one tile of x^T.
template <class V>
void pack_tile(const Tiles<V>& tiles, const float* x, int64_t tile, int64_t first, int64_t last, float* packed) {
  float* out = packed + tile * tiles.tile_floats();
  const int64_t stride = tiles.stride();
  typename V::F block[V::kLanes];
  for (int vector = 0; vector < tiles.vectors(tile); ++vector) {
    const int64_t token = tile * tiles.kWidth + vector * V::kLanes;
    for (int64_t k = first; k < last; k += V::kLanes) {
      const int64_t columns = last - k < V::kLanes ? last - k : V::kLanes;
      for (int i = 0; i < V::kLanes; ++i)
        block[i] = token + i < tiles.tokens
                       ? load_some_values<V, DType::f32>(
                             reinterpret_cast<const char*>(x + (token + i) * tiles.cols + k), columns)
                       : V::zero();
      V::transpose(block);
      for (int64_t i = 0; i < columns; ++i) V::store(out + (k + i) * stride + vector * V::kLanes, block[i]);
    }
    V::store(out + tiles.cols * stride + vector * V::kLanes, V::zero());
  }
}

// y[token][row] = c[row][token] + bias[row] for a chunk of rows and one tile.
template <class V>
void write_tile(const Tiles<V>& tiles, int64_t tile, const float* c, int64_t c_stride, int64_t row, int64_t row_last,
                int64_t rows, const float* bias, float* y) {
  typename V::F block[V::kLanes];
  for (; row < row_last; row += V::kLanes, c += V::kLanes * c_stride) {
    const int64_t valid = row_last - row < V::kLanes ? row_last - row : V::kLanes;
    const typename V::F add =
        bias ? load_some_values<V, DType::f32>(reinterpret_cast<const char*>(bias + row), valid) : V::zero();
    for (int vector = 0; vector < tiles.vectors(tile); ++vector) {
      const int64_t token = tile * tiles.kWidth + vector * V::kLanes;
      for (int i = 0; i < V::kLanes; ++i)
        block[i] = i < valid ? V::load(c + i * c_stride + vector * V::kLanes) : V::zero();
      V::transpose(block);
      for (int i = 0; i < V::kLanes && token + i < tiles.tokens; ++i) {
        float* to = y + (token + i) * rows + row;
        const typename V::F sum = V::add(block[i], add);
        if (valid == V::kLanes) {
          V::store(to, sum);
        } else {
          float local[V::kLanes];
          V::store(local, sum);
          std::memcpy(to, local, size_t(valid) * sizeof(float));
        }
      }
    }
  }
}

struct ChunkScratch {
  alignas(64) float c[kChunkRows * kGroupTiles * kTileVectors * 16];
  alignas(64) float weight[kChunkRows][kMaxBlock + 32];
  alignas(64) uint32_t offset[kChunkRows][kMaxBlock + 32];
  int64_t count[kChunkRows];
  Cursor cursor[kChunkRows];
};

// Rows row .. row_last for tiles first .. last. `length` = what an unpacker walks in a row, `block` at a time.
template <class V, class Unpacker>
void tiled_chunk(const Unpacker& unpacker, const Tiles<V>& tiles, const float* packed, int64_t length, int64_t block,
                 int64_t row, int64_t row_last, int64_t first, int64_t last, int64_t rows, const float* bias,
                 float* y) {
  thread_local Scratch<ChunkScratch> memory = scratch<ChunkScratch>(1);  // kept: fresh pages cost more than the work
  ChunkScratch& s = memory[0];
  const int64_t c_stride = (last - first) * tiles.kWidth;
  const uint32_t zero_row = uint32_t(tiles.cols * tiles.stride());
  for (int64_t r = row; r < row_last; ++r) s.cursor[r - row] = unpacker.begin(r);
  // With one tile a list is used at once and stays in the level 1 cache; with several, a tile's block stays there.
  const int64_t together = last - first == 1 ? 1 : kChunkRows;
  int64_t at = 0;
  do {  // at least once, so that c is written when there are no columns
    const int64_t count = length - at < block ? length - at : block;
    for (int64_t r = 0; r < row_last - row; r += together) {
      const int64_t r_last = r + together < row_last - row ? r + together : row_last - row;
      for (int64_t i = r; i < r_last; ++i) {
        int64_t kept = unpacker.unpack(row + i, at, count, s.cursor[i], s.weight[i % together], s.offset[i % together]);
        for (; kept % 8 != 0; ++kept) {
          s.weight[i % together][kept] = 0.0f;
          s.offset[i % together][kept] = zero_row;
        }
        s.count[i % together] = kept;
      }
      for (int64_t tile = first; tile < last; ++tile) {
        const TileRow run = kTileRow<V>[tiles.vectors(tile) - 1];
        for (int64_t i = r; i < r_last; ++i)
          run(s.weight[i % together], s.offset[i % together], s.count[i % together],
              packed + tile * tiles.tile_floats(), s.c + i * c_stride + (tile - first) * tiles.kWidth, at == 0);
      }
    }
    at += count;
  } while (at < length);
  for (int64_t tile = first; tile < last; ++tile)
    write_tile(tiles, tile, s.c + (tile - first) * tiles.kWidth, c_stride, row, row_last, rows, bias, y);
}

// make_unpacker(stride) gives the unpacker for tiles whose columns are `stride` floats apart.
template <class V, class MakeUnpacker>
void linear_tiled(const MakeUnpacker& make_unpacker, int64_t rows, int64_t cols, int64_t length, double density,
                  const float* x, int64_t tokens, const float* bias, float* y, const Parallel& parallel) {
  for (int64_t start = 0; start < tokens; start += kPanelTokens) {
    const Tiles<V> tiles{tokens - start < kPanelTokens ? tokens - start : kPanelTokens, cols};
    const float* panel_x = x + start * cols;
    float* panel_y = y + start * rows;
    Scratch<float> packed = scratch<float>(tiles.count() * tiles.tile_floats());

    constexpr int64_t kPackCols = 256;
    const int64_t column_parts = cols ? (cols + kPackCols - 1) / kPackCols : 1;
    auto pack = [&](int64_t task) {
      const int64_t first = task % column_parts * kPackCols;
      pack_tile(tiles, panel_x, task / column_parts, first, first + kPackCols < cols ? first + kPackCols : cols,
                packed.get());
    };
    parallel_for(parallel, tiles.count() * column_parts, pack);

    // 8192 floats of the tile = 32 KiB of the level 1 cache; at least 32 kept values to pay for loading and storing c.
    const double unit = double(length) / double(cols ? cols : 1);  // what the unpacker counts in a column
    int64_t columns = 8192 / tiles.stride();
    if (double(columns) * density < 32.0) columns = int64_t(32.0 / (density > 0.01 ? density : 0.01));
    int64_t block = int64_t(double(columns) * unit + 15.0) / 16 * 16;
    block = block < 16 ? 16 : block > kMaxBlock ? kMaxBlock : block;

    // Split by tokens before rows; small layers get small chunks so that every thread has work.
    const int64_t group = tiles.count() < kGroupTiles ? tiles.count() : kGroupTiles;
    const int64_t groups = (tiles.count() + group - 1) / group;
    int64_t chunk = kChunkRows;
    while (chunk > 16 && (rows + chunk - 1) / chunk * groups < 16) chunk /= 2;
    const int64_t chunks = (rows + chunk - 1) / chunk;
    const auto unpacker = make_unpacker(uint32_t(tiles.stride()));
    auto compute = [&](int64_t task) {
      const int64_t row = task % chunks * chunk, first = task / chunks * group;
      tiled_chunk<V>(unpacker, tiles, packed.get(), length, block, row, row + chunk < rows ? row + chunk : rows, first,
                     first + group < tiles.count() ? first + group : tiles.count(), rows, bias, panel_y);
    };
    parallel_for(parallel, chunks * groups, compute);
  }
}

}}  // namespace sparsify::
