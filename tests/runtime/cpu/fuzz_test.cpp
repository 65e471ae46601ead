// Damaged weights, for the sanitizers to watch: what the checks of formats.h accept is multiplied and unpacked. Every
// buffer is as large as its shape says, as ONNX Runtime sees to, and no larger.
//   fuzz_test [cases]
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "formats.h"
#include "kernels.h"
#include "pack.h"

using namespace sparsify;

namespace {

std::mt19937 random_bits(1);
int below(int limit) { return int(random_bits() % unsigned(limit)); }

void run_tasks(void*, size_t count, void (*task)(void*, size_t), void* arg) {
  for (size_t i = 0; i < count; ++i) task(arg, i);
}
const Parallel kParallel = {nullptr, run_tasks};

struct Array {
  Shape shape;
  size_t element = 1;
  std::vector<uint8_t> bytes;

  void fit() {  // what is new is random
    size_t count = element;
    for (const int64_t size : shape) count *= size_t(size);
    const size_t before = bytes.size();
    bytes.resize(count);
    bytes.shrink_to_fit();
    for (size_t i = before; i < count; ++i) bytes[i] = uint8_t(random_bits());
  }
};

struct Stored {
  DType type;
  int n, m;
  int64_t cols, group;
  bool bitmask;
  Array values, places, row_start, scales;  // places: indices or mask
};

const char* const kFields[] = {"n", "m", "in_features", "group", "type", "values", "places", "row_start", "scales",
                               "shape of values", "shape of places", "shape of row_start", "shape of scales"};

Stored sound() {
  const DType types[] = {DType::f32, DType::f16, DType::bf16, DType::i8, DType::i4};
  const int patterns[][2] = {{1, 2}, {2, 4}, {1, 4}, {3, 4}, {2, 3}, {4, 8}, {5, 7}, {8, 16}, {2, 17}, {16, 32}};
  Stored s;
  s.type = types[below(5)];
  s.bitmask = below(2);
  s.n = patterns[below(10)][0];
  for (const auto& [n, m] : patterns)
    if (n == s.n) s.m = m;
  s.group = s.type == DType::i4 ? int64_t{32} << below(3) : 0;
  const int64_t rows = below(20);
  s.cols = s.bitmask ? below(200) : below(40) * s.m;
  std::vector<float> dense(size_t(rows * s.cols));
  for (size_t i = 0; i < dense.size(); ++i)
    if (s.bitmask ? below(2) : int(int64_t(i) % s.cols % s.m) < s.n) dense[i] = float(below(15) - 7);
  const bool quantised = is_quantised(s.type);
  s.scales.element = s.type == DType::i4 ? 2 : 4;
  s.scales.shape = s.type == DType::i8 ? Shape{rows} : Shape{rows, s.group ? (s.cols + s.group - 1) / s.group : 0};
  s.scales.fit();
  if (quantised) find_scales(dense.data(), rows, s.cols, s.type, s.group, s.scales.bytes.data(), kParallel);
  s.values.element = s.type == DType::i4 ? 1 : byte_size(s.type);
  if (s.bitmask) {
    std::vector<int64_t> starts(size_t(rows + 1));
    s.places.shape = {rows, (s.cols + 7) / 8};
    s.places.fit();
    find_mask(dense.data(), rows, s.cols, s.type, s.places.bytes.data(), starts.data(), kParallel);
    s.row_start = {{rows + 1}, 8, {}};
    s.row_start.fit();
    std::memcpy(s.row_start.bytes.data(), starts.data(), starts.size() * 8);
    s.values.shape = {starts.back()};
    s.values.fit();
    const BitmaskWeight w{rows, s.cols, s.type, nullptr, s.places.bytes.data(), starts.data(), s.scales.bytes.data(), s.group};
    pack_bitmask(dense.data(), w, s.values.bytes.data(), kParallel);
  } else {
    const NmWeight w{rows, s.cols, s.n, s.m, s.type, nullptr, nullptr, s.scales.bytes.data(), s.group};
    s.values.shape = {rows, s.type == DType::i4 ? w.value_bytes_per_row() : w.kept_per_row()};
    s.places.shape = {rows, w.index_bytes_per_row()};
    s.values.fit();
    s.places.fit();
    pack_nm(dense.data(), w, s.values.bytes.data(), s.places.bytes.data(), kParallel);
  }
  return s;
}

int64_t odd_number(int64_t value) {
  value = value < -4096 || value > 4096 ? 4096 : value;
  const int64_t odd[] = {0, 1, -1, 2, value + 1, value - 1, value * 2, value / 2, value + 8, 16, 32, 33, 64, 128, INT32_MAX,
                         int64_t{1} << 34, INT64_MAX, INT64_MIN};
  return odd[below(18)];
}

void damage(Stored& s, int field) {
  Array* const arrays[] = {&s.values, &s.places, &s.row_start, &s.scales};
  const auto as_int = [](int64_t v) { return int(v < INT32_MIN ? INT32_MIN : v > INT32_MAX ? INT32_MAX : v); };
  if (field == 0) s.n = as_int(odd_number(s.n));
  if (field == 1) s.m = as_int(odd_number(s.m));
  if (field == 2) s.cols = odd_number(s.cols);
  if (field == 3) s.group = odd_number(s.group);
  if (field == 4) s.type = DType(below(5));
  if (field >= 5 && field < 9) {
    std::vector<uint8_t>& bytes = arrays[field - 5]->bytes;
    for (int i = 1 + below(3); i > 0 && !bytes.empty(); --i) bytes[random_bits() % bytes.size()] ^= uint8_t(1 << below(8));
  }
  if (field >= 9) {
    Array& array = *arrays[field - 9];
    if (array.shape.empty() || !below(8)) array.shape.push_back(below(3));
    else if (!below(8)) array.shape.pop_back();
    else {
      int64_t& size = array.shape[size_t(below(int(array.shape.size())))];
      const int64_t before = size;
      size = odd_number(size);
      if (size < 0 || size > 4096) size = before + 1;
    }
    array.fit();
  }
  if (field == 4) {  // the file says another type: as many elements of another size
    s.values.element = s.type == DType::i4 ? 1 : byte_size(s.type);
    s.scales.element = s.type == DType::i4 ? 2 : 4;
    s.values.fit();
    s.scales.fit();
  }
}

// Whether the checks accept it; what they accept is used.
bool survives(const Kernels& kernels, Stored& s) {
  const Shape* scales = is_quantised(s.type) ? &s.scales.shape : nullptr;
  const void* scale = scales ? s.scales.bytes.data() : nullptr;
  const int64_t tokens[] = {1, 2, 5, 12, 40};
  const auto use = [&](auto& w, auto linear, auto unpack) {
    const int64_t count = tokens[below(5)];
    std::vector<float> x(size_t(count * w.cols), 0.5f), y(size_t(count * w.rows)), dense(size_t(w.rows * w.cols));
    linear(w, x.data(), count, nullptr, y.data(), kParallel);
    unpack(w, dense.data(), kParallel);
  };
  if (s.bitmask) {
    BitmaskWeight w{0, s.cols, s.type, s.values.bytes.data(), s.places.bytes.data(),
                    reinterpret_cast<const int64_t*>(s.row_start.bytes.data()), scale, s.group};
    if (!check_bitmask(w, s.values.shape, s.places.shape, s.row_start.shape, scales, nullptr).empty()) return false;
    use(w, kernels.linear_bitmask, unpack_bitmask);
  } else {
    NmWeight w{0, s.type == DType::i4 ? s.cols : 0, s.n, s.m, s.type, s.values.bytes.data(), s.places.bytes.data(), scale, s.group};
    if (!check_nm(w, s.values.shape, s.places.shape, scales, nullptr).empty()) return false;
    use(w, kernels.linear_nm, unpack_nm);
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const char* error = nullptr;
  const Kernels* kernels = best_kernels(&error);
  if (!kernels) {
    std::printf("skipped: %s\n", error);
    return 77;
  }
  const int cases = argc > 1 ? std::atoi(argv[1]) : 60000;
  int tried[13] = {}, accepted[13] = {}, refused_sound = 0;
  for (int i = 0; i < cases; ++i) {
    Stored stored = sound();
    refused_sound += !survives(*kernels, stored);
    const int field = below(13);
    damage(stored, field);
    if (below(4) == 0) damage(stored, below(13));  // two that may fit each other
    ++tried[field];
    accepted[field] += survives(*kernels, stored);
  }
  for (int field = 0; field < 13; ++field)
    std::printf("%-20s %d of %d accepted\n", kFields[field], accepted[field], tried[field]);
  std::printf("%s: %d cases, %d sound weights refused\n", kernels->isa, cases, refused_sound);
  return refused_sound != 0;
}
