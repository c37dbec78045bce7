// The noise that rounds: a number of each place of a matrix, gwt_dist/noise.py in vectors.

#pragma once

#include <array>
#include <cstdint>

#include "bits.h"

namespace {

// lowbias32, of one number or of V.
template <typename T>
INLINE T mix(T x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// The key of the noise of weights (what: 0) or of moments (1) at a step.
inline uint32_t noise_key(uint32_t step, uint32_t what, uint32_t seed, uint32_t salt) {
  return mix(step ^ mix(what ^ mix(seed ^ salt)));
}

constexpr std::array<uint32_t, 16> NUMBERED{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
static_assert(V <= NUMBERED.size());

// The noise of places side by side, from one on, V at a time. Rows of `columns` numbers follow each other.
class Noise {
 public:
  Noise(uint32_t key, int64_t row, int64_t column, int64_t columns)
      : key_(key), row_(row), column_(column), columns_(columns), of_row_(mix(static_cast<uint32_t>(row) ^ key)) {}

  // That of the next V places.
  INLINE Bits next() {
    const Bits found = here<1>(0);
    advance(V);
    return found;
  }

  // Of the next 2 * V: those of places 0, 2, 4 ... and of 1, 3, 5 ...
  INLINE std::array<Bits, 2> next_pairs() {
    const std::array<Bits, 2> found{here<2>(0), here<2>(1)};
    advance(2 * V);
    return found;
  }

  // That of the next n, whole vectors, in memory.
  INLINE void take(uint32_t* out, int64_t n) {
    if (C10_LIKELY(column_ + n <= columns_)) {
      Bits column = loaded<Bits>(NUMBERED.data()) + static_cast<uint32_t>(column_);
      for (int64_t i = 0; i < n; i += V, column += V) stored(out + i, mix(column ^ of_row_));
      advance(n);
    } else {
      for (int64_t i = 0; i < n; i += V) stored(out + i, next());
    }
  }

  INLINE void advance(int64_t places) {
    column_ += places;
    if (C10_UNLIKELY(column_ >= columns_)) {
      row_ += column_ / columns_, column_ %= columns_;
      of_row_ = mix(static_cast<uint32_t>(row_) ^ key_);
    }
  }

 private:
  template <int STRIDE>
  INLINE Bits here(uint32_t first) const {
    const Bits places = loaded<Bits>(NUMBERED.data()) * STRIDE + first;
    if (C10_LIKELY(column_ + STRIDE * V <= columns_)) return mix((places + static_cast<uint32_t>(column_)) ^ of_row_);
    return beyond(STRIDE, first, row_, column_, columns_, key_);
  }

  // Of places counted from this one that reach into the rows below. Given no address, so that noise stays in registers.
  static C10_NOINLINE Bits beyond(uint32_t stride, uint32_t first, int64_t row, int64_t column, int64_t columns,
                                  uint32_t key) {
    const Bits places = loaded<Bits>(NUMBERED.data()) * stride + first;
    Bits its_column = places + static_cast<uint32_t>(column), its_row = Bits{} + static_cast<uint32_t>(row);
    for (int64_t end = columns - column; end < 2 * V; end += columns) {
      const Bits over = (Bits)((Whole)places >= static_cast<int32_t>(end));
      its_column -= over & static_cast<uint32_t>(columns), its_row -= over;
    }
    return mix(its_column ^ mix(its_row ^ key));
  }

  uint32_t key_;
  int64_t row_, column_, columns_;
  uint32_t of_row_;
};

}  // namespace
