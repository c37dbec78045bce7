// How a weight is rounded to what it is kept in: to the nearest, or, for bf16 weights alone, by the noise of its place.
//
// `Rounding` is what the build chooses. It goes along with the weights of a pass, from the first on.

#pragma once

#include <type_traits>

#include "noise.h"

namespace {

constexpr uint32_t INFINITE = 0x7f800000, SIZE = 0x7fffffff;

// The upper halves are those of bf16, by the 16 bits of a chance; what is not finite stays so.
INLINE Bits rounded_by(const Bits& x, const Bits& chance) {
  const Whole size = (Whole)(x & SIZE);
  const Bits finite = (Bits)(size < static_cast<int32_t>(INFINITE)), nan = (Bits)(size > static_cast<int32_t>(INFINITE));
  return (x + (chance & finite)) | (nan & 0x400000u);
}

class Nearest {
 public:
  static constexpr bool PLACED = false;  // whether it matters where a weight is
  template <typename W>
  static constexpr bool TAKES = true;

  explicit Nearest(const Noise&) {}
  void advance(int64_t) {}

  template <typename W>
  INLINE void put(W* w, const Vec& x) {
    store(w, x);
  }

  template <typename W>
  INLINE void put_pairs(W* w, const Pairs& x) {
    store_pairs(w, x);
  }
};

class Stochastic {
 public:
  static constexpr bool PLACED = true;
  template <typename W>
  static constexpr bool TAKES = std::is_same_v<W, BFloat16>;

  explicit Stochastic(const Noise& noise) : noise_(noise) {}
  void advance(int64_t weights) { noise_.advance(weights); }

  INLINE void put(BFloat16* w, const Vec& x) {
    store_narrow(reinterpret_cast<uint16_t*>(w), (Whole)(rounded_by(bits(x), noise_.next() >> 16) >> 16));
  }

  // Two bf16 lie in the place of one float, the even one in its low half.
  INLINE void put_pairs(BFloat16* w, const Pairs& x) {
    const auto [even, odd] = noise_.next_pairs();
    stored(w, (rounded_by(bits(x.even), even >> 16) >> 16) | (rounded_by(bits(x.odd), odd >> 16) & 0xffff0000u));
  }

 private:
  Noise noise_;
};

namespace rounding {
using nearest = Nearest;
using stochastic = Stochastic;
}  // namespace rounding

using Rounding = rounding::GWT_ROUNDING;

}  // namespace
