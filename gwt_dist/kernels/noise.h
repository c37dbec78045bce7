// The noise that rounds: a number of each place of a matrix, gwt_dist/formulas/noise.py in vectors.
//
// Bits are V whole numbers of 32 bits in the compiler's own vectors, which every instruction set has.

#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#include "vectors.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors of another width have no part in calls between libraries

namespace {

typedef uint32_t Bits __attribute__((vector_size(4 * V)));
typedef int32_t Whole __attribute__((vector_size(4 * V)));  // and what comparisons say, -1 for true
typedef float Floats __attribute__((vector_size(4 * V)));
typedef uint16_t Halves __attribute__((vector_size(2 * V)));

template <typename T, typename From>
INLINE T loaded(const From* p) {
  T x;
  std::memcpy(&x, p, sizeof(T));
  return x;
}

template <typename T, typename To>
INLINE void stored(To* p, const T& x) {
  std::memcpy(p, &x, sizeof(T));
}

INLINE Bits bits(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return (Bits) static_cast<__m512>(x);
#elif defined(CPU_CAPABILITY_AVX2)
  return (Bits) static_cast<__m256>(x);
#else
  float values[V];
  x.store(values);
  return loaded<Bits>(values);
#endif
}

// lowbias32, of one number or of V.
template <typename T>
INLINE T mix(T x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// The key of the noise of a field (0 the weight, 1 exp_avg, 2 exp_avg_sq) at a step.
inline uint32_t noise_key(uint32_t step, uint32_t field, uint32_t seed, uint32_t salt) {
  return mix(step ^ mix(field ^ mix(seed ^ salt)));
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
    return beyond(places);
  }

  // Of places counted from this one that reach into the rows below.
  C10_NOINLINE Bits beyond(const Bits& places) const {
    Bits column = places + static_cast<uint32_t>(column_), row = Bits{} + static_cast<uint32_t>(row_);
    for (int64_t end = columns_ - column_; end < 2 * V; end += columns_) {
      const Bits over = (Bits)((Whole)places >= static_cast<int32_t>(end));
      column -= over & static_cast<uint32_t>(columns_), row -= over;
    }
    return mix(column ^ mix(row ^ key_));
  }

  uint32_t key_;
  int64_t row_, column_, columns_;
  uint32_t of_row_;
};

}  // namespace
