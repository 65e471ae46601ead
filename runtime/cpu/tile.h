// Many tokens: y = x W^T with the tokens in the lanes.
//
//   x is transposed once into tiles       tile[k][token]     of up to kTileVectors vectors of tokens
//   and then, for each kept weight w at k: sum[token] += w * tile[k][token]
//
// Only kept weights cost anything, whatever the pattern: one broadcast, and an FMA per vector whose memory operand is the
// row of the tile that the weight's column names. The limit is two loads a cycle from the level 1 cache, so:
//   - the columns come straight from the packed bits, by shifts (2:4) or by finding the lowest set bit (anything else):
//     a list of offsets in memory would take load slots, and measured a third slower;
//   - 2:4 weights are loaded a register at a time and broadcast from there;
//   - W is cut along K into blocks whose part of the tile is 32 KiB, used for all rows of a chunk before the next.
#pragma once
#include "rows.h"
#include "scratch.h"
#include "unrolled.h"

namespace sparsify { namespace {

constexpr int64_t kBlockFloats = 8192;  // of a tile: 32 of 48 KiB of the level 1 cache, and the rest for W and sums
constexpr int64_t kChunkRows = 128;      // rows of W that share a block of a tile while it is in cache
constexpr int64_t kMostTokens = 1024;  // tokens transposed at a time: bounds the scratch memory

// T vectors of sums for one row of W, each kept kChains times so that enough FMAs are in flight when T is small.
template <class V, int T>
struct Sums {
  static constexpr int kChains = V::kAccumulators / T >= 4 ? 4 : V::kAccumulators / T >= 2 ? 2 : 1;
  typename V::F chain[kChains][T];

  SPARSIFY_INLINE void begin(const float* c, bool first) {
    unrolled<T>([&](auto t) SPARSIFY_INLINE {
      chain[0][t] = first ? V::zero() : V::load(c + t * V::kLanes);
      unrolled<kChains - 1>([&](auto a) SPARSIFY_INLINE { chain[a + 1][t] = V::zero(); });
    });
  }
  template <int a>
  SPARSIFY_INLINE void add(typename V::F weight, const char* row) {
    unrolled<T>([&](auto t) SPARSIFY_INLINE {
      chain[a % kChains][t] =
          V::fma(weight, V::load(reinterpret_cast<const float*>(row) + t * V::kLanes), chain[a % kChains][t]);
    });
  }
  SPARSIFY_INLINE void end(float* c) {
    unrolled<T>([&](auto t) SPARSIFY_INLINE {
      unrolled<kChains - 1>([&](auto a) SPARSIFY_INLINE { chain[0][t] = V::add(chain[0][t], chain[a + 1][t]); });
      V::store(c + t * V::kLanes, chain[0][t]);
    });
  }
};

// Keeps the compiler from folding the pointer into eight indexed addresses.
SPARSIFY_INLINE inline void in_register(const char*& p) { asm("" : "+r"(p)); }

// c (+)= 2:4 weights x tile for a block of columns. `codes`: two bits a weight, from the block's first.
template <class V, int T>
void tile_24(const float* values, const uint8_t* codes, int64_t columns, const float* tile, float* c, bool first) {
  constexpr int64_t kRow = T * V::kLanes * 4;  // bytes of a tile's row
  constexpr int64_t kStep = 2 * V::kLanes;     // columns of a register of weights
  const char* x = reinterpret_cast<const char*>(tile);
  const typename V::I one = V::broadcast(uint32_t(1));
  Sums<V, T> sums;
  sums.begin(c, first);
  const auto group = [&](auto g, typename V::F weights, typename V::I& lane, uint64_t word) SPARSIFY_INLINE {
    const char* left = x + (word & 3) * kRow;
    const char* right = x + (word >> 2 & 3) * kRow;
    in_register(left);
    in_register(right);
    sums.template add<2 * g>(V::pick(weights, lane), left);
    lane = V::add(lane, one);
    sums.template add<2 * g + 1>(V::pick(weights, lane), right);
    lane = V::add(lane, one);
    x += 4 * kRow;
  };
  int64_t k = 0;
  for (; k + kStep <= columns; k += kStep, values += V::kLanes, codes += V::kLanes / 4) {
    const typename V::F weights = V::load(values);
    typename V::I lane = V::broadcast(uint32_t(0));
    uint64_t word = load_bits(codes, V::kLanes / 4);
    for (int pair = 0; pair < V::kLanes / 4; ++pair, word >>= 8) {
      group(std::integral_constant<int, 0>(), weights, lane, word);
      group(std::integral_constant<int, 1>(), weights, lane, word >> 4);
    }
  }
  if (k < columns) {
    const int64_t kept = (columns - k) / 2;
    const typename V::F weights = load_some_values<V, DType::f32>(reinterpret_cast<const char*>(values), kept);
    typename V::I lane = V::broadcast(uint32_t(0));
    uint64_t word = load_bits(codes, (kept + 3) / 4);
    for (int64_t i = 0; i < kept; i += 2, word >>= 4) group(std::integral_constant<int, 0>(), weights, lane, word);
  }
  sums.end(c);
}

// The same for any pattern: bit k of `words` = column k is kept. Returns the values behind those used.
template <class V, int T>
const float* tile_bits(const float* values, const uint64_t* words, int64_t columns, const float* tile, float* c,
                       bool first) {
  constexpr int64_t kRow = T * V::kLanes * 4;
  const char* x = reinterpret_cast<const char*>(tile);
  Sums<V, T> sums;
  sums.begin(c, first);
  for (int64_t k = 0; k < columns; k += kWordColumns, ++words, x += kWordColumns * kRow) {
    uint64_t word = *words;
    int kept = __builtin_popcountll(word);
    const auto next = [&](auto a) SPARSIFY_INLINE {
      const char* row = x + __builtin_ctzll(word) * kRow;
      in_register(row);
      word &= word - 1;
      sums.template add<a>(V::broadcast(values[a]), row);
    };
    constexpr int kAtOnce = Sums<V, T>::kChains > 2 ? 4 : 2;
    for (; kept >= kAtOnce; kept -= kAtOnce, values += kAtOnce) unrolled<kAtOnce>(next);
    for (; kept > 0; --kept, ++values) next(std::integral_constant<int, 0>());
  }
  sums.end(c);
  return values;
}

inline bool has_24_codes(const NmWeight& w) { return w.n == 2 && w.m == 4; }
inline bool has_24_codes(const BitmaskWeight&) { return false; }
inline const uint8_t* codes(const NmWeight& w, int64_t row) { return w.indices + row * w.index_bytes_per_row(); }
inline const uint8_t* codes(const BitmaskWeight&, int64_t) { return nullptr; }

// How `tokens` tokens are cut into tiles, all full but the last. A tile is [cols][vectors * kLanes].
template <class V>
struct Tiles {
  int64_t tokens, cols;

  static constexpr int64_t kWidth = V::kTileVectors * V::kLanes;
  int64_t count() const { return (tokens + kWidth - 1) / kWidth; }
  int vectors(int64_t tile) const {
    const int64_t left = tokens - tile * kWidth;
    return left >= kWidth ? V::kTileVectors : int((left + V::kLanes - 1) / V::kLanes);
  }
  int64_t floats() const { return cols * ((count() - 1) * kWidth + vectors(count() - 1) * V::kLanes); }
};

// Columns first .. last of one tile of x^T.
template <class V>
void pack_tile(const Tiles<V>& tiles, const float* x, int64_t tile, int64_t first, int64_t last, float* packed) {
  float* out = packed + tile * tiles.cols * tiles.kWidth;
  const int64_t stride = tiles.vectors(tile) * V::kLanes;
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
  }
}

// y[token][row] = c[row][token] + bias[row] for a chunk of rows and one tile.
template <class V>
void write_tile(const Tiles<V>& tiles, int64_t tile, const float* c, int64_t row, int64_t row_last, int64_t rows,
                const float* bias, float* y) {
  const int64_t stride = tiles.vectors(tile) * V::kLanes;
  typename V::F block[V::kLanes];
  for (; row < row_last; row += V::kLanes, c += V::kLanes * stride) {
    const int64_t valid = row_last - row < V::kLanes ? row_last - row : V::kLanes;
    const typename V::F add =
        bias ? load_some_values<V, DType::f32>(reinterpret_cast<const char*>(bias + row), valid) : V::zero();
    for (int vector = 0; vector < tiles.vectors(tile); ++vector) {
      const int64_t token = tile * tiles.kWidth + vector * V::kLanes;
      for (int i = 0; i < V::kLanes; ++i) block[i] = i < valid ? V::load(c + i * stride + vector * V::kLanes) : V::zero();
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

// A row of W as a tile kernel walks it, block by block.
struct WalkedRow {
  const float* values;
  const uint8_t* codes;   // 2:4
  const uint64_t* words;  // anything else
};

// Advances one row by a block of columns and asks for its next one, which the jump from row to row hides from the
// hardware: as many values as this block had.
template <class V, int T>
SPARSIFY_INLINE inline void walk_block(WalkedRow& row, int64_t first, int64_t columns, const float* tile, float* c) {
  const float* const begin = row.values;
  if (row.codes) {
    tile_24<V, T>(begin, row.codes + first / 8, columns, tile, c, first == 0);
    row.values += columns / 2;
    prefetch(row.codes + (first + columns) / 8);
  } else {
    row.values = tile_bits<V, T>(begin, row.words + first / kWordColumns, columns, tile, c, first == 0);
  }
  for (const float *at = row.values, *end = at + (at - begin); at < end; at += 16) prefetch(at);
}

// The rows of a chunk for one tile of T vectors.
template <class V, int T>
void tiled_chunk(const WalkedRow* walked, int64_t count, int64_t cols, const float* tile, float* c) {
  constexpr int64_t kStride = T * V::kLanes;
  constexpr int64_t kBlock = kBlockFloats / kStride / kWordColumns * kWordColumns;
  WalkedRow rows[kChunkRows];
  for (int64_t i = 0; i < count; ++i) rows[i] = walked[i];
  int64_t k = 0;
  do {  // at least once, so that c is written when there are no columns
    const int64_t columns = cols - k < kBlock ? cols - k : kBlock;
    const float* ahead = tile + (k + columns) * kStride;  // the tile's next block, fetched a share with each row
    const int64_t share = kBlock * kStride / count / 16 * 16 + 16;
    for (int64_t i = 0; i < count; ++i) {
      if (i + 2 < count)  // from the level 2 cache, where the block before has put them
        unrolled<3>([&](auto line) SPARSIFY_INLINE { __builtin_prefetch(rows[i + 2].values + line * 16, 0, 3); });
      walk_block<V, T>(rows[i], k, columns, tile + k * kStride, c + i * kStride);
      for (int64_t p = 0; p < share; p += 16) prefetch(ahead + i * share + p);
    }
    k += columns;
  } while (k < cols);
}

template <class V>
using TiledChunk = void (*)(const WalkedRow*, int64_t, int64_t, const float*, float*);
template <class V, class Index>
struct TiledChunks;
template <class V, int... index>
struct TiledChunks<V, std::integer_sequence<int, index...>> {
  static constexpr TiledChunk<V> kFor[] = {tiled_chunk<V, index + 1>...};  // by the number of vectors - 1
};

template <class V, class Weight>
void linear_tiled(const Weight& w, const float* x, int64_t tokens, const float* bias, float* y,
                  const Parallel& parallel) {
  using Chunks = TiledChunks<V, std::make_integer_sequence<int, V::kTileVectors>>;
  const bool is_24 = has_24_codes(w);
  for (int64_t start = 0; start < tokens; start += kMostTokens) {
    const Tiles<V> tiles{tokens - start < kMostTokens ? tokens - start : kMostTokens, w.cols};
    const float* panel_x = x + start * w.cols;
    float* panel_y = y + start * w.rows;
    Scratch<float> packed = scratch<float>(tiles.floats());

    constexpr int64_t kPackCols = 256;
    const int64_t column_parts = w.cols ? (w.cols + kPackCols - 1) / kPackCols : 1;
    auto pack = [&](int64_t task) {
      const int64_t first = task % column_parts * kPackCols;
      pack_tile(tiles, panel_x, task / column_parts, first, first + kPackCols < w.cols ? first + kPackCols : w.cols,
                packed.get());
    };
    parallel_for(parallel, tiles.count() * column_parts, pack);

    // A task is a chunk of rows for one tile, all tiles of a chunk in a row: its weights come from memory once. Small
    // layers get small chunks so that every thread has work.
    int64_t chunk = kChunkRows;
    while (chunk > V::kLanes && (w.rows + chunk - 1) / chunk * tiles.count() < 16) chunk /= 2;
    const int64_t chunks = (w.rows + chunk - 1) / chunk;
    auto compute = [&](int64_t task) {
      const int64_t tile = task % tiles.count(), row = task / tiles.count() * chunk;
      const int64_t count = row + chunk < w.rows ? chunk : w.rows - row;
      thread_local KeptScratch<float> values_room, c_room;
      thread_local KeptScratch<uint64_t> words_room;
      WalkedRow walked[kChunkRows];
      const int64_t words = mask_words(w.cols);
      float* values = values_room.get(w.type == DType::f32 ? 0 : chunk * w.cols);
      uint64_t* masks = words_room.get(is_24 ? 0 : chunk * words);
      for (int64_t i = 0; i < count; ++i)
        if (is_24) {
          walked[i] = {row_values<V>(w, row + i, values + i * w.cols), codes(w, row + i), nullptr};
        } else {
          walked[i] = {row_values<V>(w, row + i, values + i * w.cols), nullptr, masks + i * words};
          row_mask(w, row + i, masks + i * words);
        }
      float* c = c_room.get(chunk * tiles.kWidth);
      Chunks::kFor[tiles.vectors(tile) - 1](walked, count, w.cols, packed.get() + tile * tiles.cols * tiles.kWidth, c);
      write_tile(tiles, tile, c, row, row + count, w.rows, bias, panel_y);
    };
    parallel_for(parallel, chunks * tiles.count(), compute);
  }
}

}}  // namespace sparsify::
