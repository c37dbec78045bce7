// What all passes over Haar units share: groups of V neighbouring units of 2**L elements, a lane for each unit.

#pragma once

#include <algorithm>
#include <array>

#include "formats.h"

// The header of a name that the build hands over.
#define GWT_TEXT(x) #x
#define GWT_HEADER(folder, name) GWT_TEXT(folder/name.h)

namespace {

constexpr int MAX_LEVEL = 8;

// Squares are added in double, lane by lane; the order depends on nothing but the item.
using Lanes = std::array<double, V>;

// Groups between reading gradients and writing weights: enough for the latencies of one unit's root and division to hide
// behind other units, few enough for the gradients to stay in the L1 cache.
template <int L>
constexpr int BLOCK = std::clamp(256 / (V << L), 1, 32);

// Fetches a group that lies `ahead` elements further on, past the end or not: the processor's own prefetching stops at
// the end of a page, and does not know that weights follow gradients.
template <int L, int ahead, typename T>
INLINE void prefetch(const T* p) {
  for (size_t i = 0; i < V << L; i += 64 / sizeof(T)) __builtin_prefetch(p + ahead + i);
}

// What the elements of V units have in common.
template <int FACTORS>
struct UnitFactors {
  std::array<std::array<float, V>, FACTORS> factors;

  INLINE void keep(const std::array<Vec, FACTORS>& given) {
    for (int i = 0; i < FACTORS; ++i) given[i].store(factors[i].data());
  }

  INLINE std::array<Vec, FACTORS> load() const {
    std::array<Vec, FACTORS> found;
    for (int i = 0; i < FACTORS; ++i) found[i] = Vec::loadu(factors[i].data());
    return found;
  }
};

// Those for the elements of vector j of a group.
template <int L, size_t FACTORS>
INLINE std::array<Vec, FACTORS> spread_all(const std::array<Vec, FACTORS>& units, int j) {
  std::array<Vec, FACTORS> found;
  for (size_t i = 0; i < FACTORS; ++i) found[i] = spread<L>(units[i], j);
  return found;
}

// Units side by side, the last of which has `last` elements: x. Those at lead..lead + held lie at w as well.
template <int L, typename W, typename G>
struct Span {
  static constexpr int64_t U = 1 << L;

  const G* x;
  W* w;
  int64_t units, last, lead, held;

  int64_t elements() const { return (units - 1) * U + last; }

  // Groups that need no copy: all their elements are there.
  int64_t groups() const { return lead == 0 && held == elements() ? (last == U ? units : units - 1) / V : 0; }

  // At most n of the units, from `first` on.
  Span part(int64_t first, int64_t n) const {
    const int64_t count = std::min(n, units - first), its_last = first + count == units ? last : U;
    const int64_t begin = first * U, end = begin + (count - 1) * U + its_last;
    const int64_t low = std::clamp(lead, begin, end), high = std::clamp(lead + held, begin, end);
    return {x + begin, w + (low - lead), count, its_last, low - begin, high - low};
  }
};

// Units whose moments are decoded at once where they are not stored in fp32: whole cells; enough for the start of a pass
// to weigh little, few enough for memory not to stand still while they are encoded, gradients still in the L1 cache.
template <int L>
constexpr int64_t DECODED = std::clamp<int64_t>(1024 >> L, CELL, 4 * CELL);

}  // namespace
