// How state is stored, gwt_dist/formulas/codecs.py in vectors: moments in fp32, or as codes, of which a cell has a scale.
//
// A pass over units knows fp32 alone. It is given a block of moments, decoded, and they are encoded when it has updated
// them; what is stored is what is used, so encoding puts in their place what decoding will find.

#pragma once

#include <algorithm>
#include <array>
#include <limits>

#include "rounding.h"

namespace {

enum Format : int64_t { GWT_FORMATS, FORMATS };  // the names of formats.py, in order

constexpr int64_t CELL = 64;  // numbers that are encoded at once, and that a scale is for
static_assert(CELL % V == 0);

template <typename To, typename From>
INLINE To same_bits(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  return loaded<To>(&x);
}

// The largest size of the numbers of a cell, NaN and infinity being larger than all others.
INLINE float largest(const float* x) {
  Whole most{};
  for (int64_t i = 0; i < CELL; i += V) {
    const Whole its = (Whole)(loaded<Bits>(x + i) & SIZE);
    most = its > most ? its : most;
  }
  return same_bits<float>(largest_lane(most));
}

// The 16 bits by which each of the numbers side by side is rounded: a half of their noise, see noise.py.
struct Chance {
  const uint32_t* noise;
  int left;  // 0 for the upper half, 16 for the lower one

  INLINE Bits at(int64_t i) const { return (loaded<Bits>(noise + i) << left) >> 16; }
};

// A cell that has no codes, as it is too small or not finite: all are 0, and mean `x_of_0`.
template <typename Code>
C10_NOINLINE float blank(float* x, Code* codes, const Floats& x_of_0, float scale) {
  for (int64_t i = 0; i < CELL; i += V) stored(x + i, x_of_0);
  std::fill_n(codes, CELL, 0);
  return scale;
}

// One cell, or as many numbers without a scale: x [64].
template <Format FORMAT>
struct Codec;

template <>
struct Codec<bf16> {
  using Code = uint16_t;
  static constexpr bool SCALED = false;

  static INLINE void decode(const Code* codes, float, float* x) {
    for (int64_t i = 0; i < CELL; i += V) stored(x + i, (Bits)widened(codes + i) << 16);
  }

  static INLINE float encode(float* x, Code* codes, float, const Chance& chance) {
    for (int64_t i = 0; i < CELL; i += V) {
      const Bits upper = rounded_by(loaded<Bits>(x + i), chance.at(i)) >> 16;
      store_narrow(codes + i, (Whole)upper);
      stored(x + i, upper << 16);
    }
    return 0;
  }
};

// Companded: codes of small numbers are twice as dense as linear ones, and read without a division.
template <>
struct Codec<int8> {
  using Code = int8_t;
  static constexpr bool SCALED = true;
  static constexpr float LARGEST = 127, HALF = LARGEST / 2;

  static INLINE Floats size_of(const Floats& x) { return (Floats)((Bits)x & SIZE); }

  static INLINE Floats decoded(const Floats& code, float scale) { return code * (size_of(code) + LARGEST) * scale; }

  static INLINE void decode(const Code* codes, float scale, float* x) {
    for (int64_t i = 0; i < CELL; i += V) {
      stored(x + i, decoded(__builtin_convertvector(widened(codes + i), Floats), scale));
    }
  }

  static INLINE float encode(float* x, Code* codes, float top, const Chance& chance) {
    const float scale = top * 3.100006142631173e-05f, inverse = 1 / scale;
    if (C10_UNLIKELY(!(scale >= std::numeric_limits<float>::min() && scale < std::numeric_limits<float>::infinity()))) {
      return blank(x, codes, decoded(Floats{}, scale), scale);
    }
    for (int64_t i = 0; i < CELL; i += V) {
      const Floats y = loaded<Floats>(x + i) * inverse, z = root(size_of(y) + HALF * HALF) - HALF;
      const Floats with_sign = (Floats)((Bits)z | ((Bits)y & ~SIZE));
      Floats code = floored(with_sign + __builtin_convertvector((Whole)chance.at(i), Floats) * 0x1p-16f);
      code = code < -LARGEST ? -LARGEST : code;
      code = code > LARGEST ? LARGEST : code;
      store_narrow(codes + i, __builtin_convertvector(code, Whole));
      stored(x + i, decoded(code, scale));
    }
    return scale;
  }
};

// Numbers that are not negative, by their logarithm: 4 bits of exponent below the scale and above it, 4 of the fraction.
template <>
struct Codec<e4m4> {
  using Code = uint8_t;
  static constexpr bool SCALED = true;

  static INLINE Floats decoded(const Whole& code, float scale) { return (Floats)((code + (112 << 4)) << 19) * scale; }

  static INLINE void decode(const Code* codes, float scale, float* x) {
    for (int64_t i = 0; i < CELL; i += V) stored(x + i, decoded(widened(codes + i), scale));
  }

  static INLINE float encode(float* x, Code* codes, float top, const Chance& chance) {
    const int32_t bits = same_bits<int32_t>(top);
    // The largest may be rounded up to the next power of two, which must have a code: without it a cell could not grow.
    const int32_t exponent = (bits >> 23) + ((bits & 0x7FFFFF) > (15 << 19) && bits < (254 << 23));
    const float scale = exponent >= 32 ? same_bits<float>(exponent << 23) : 0;
    if (C10_UNLIKELY(exponent < 32 || exponent == 255)) return blank(x, codes, decoded(Whole{}, scale), scale);
    const int32_t before = (exponent - 15) << 4;
    for (int64_t i = 0; i < CELL; i += V) {
      Whole code = (Whole)((loaded<Bits>(x + i) + (chance.at(i) << 3)) >> 19) - before;
      code = code < 0 ? 0 : code;
      code = code > 255 ? 255 : code;
      store_narrow(codes + i, code);
      stored(x + i, decoded(code, scale));
    }
    return scale;
  }
};

// n numbers of a row from the start of a cell on: codes [n], scales [ceil(n / 64)], x [n, rounded up to cells], of which
// the rest is overwritten. Codes of a cell that is not whole go through a copy.
template <Format FORMAT>
void decode(const void* from, const float* scales, float* x, int64_t n) {
  using C = Codec<FORMAT>;
  const auto* codes = static_cast<const typename C::Code*>(from);
  for (; n > 0; n -= CELL, codes += CELL, x += CELL) {
    const float scale = C::SCALED ? *scales++ : 0;
    if (C10_LIKELY(n >= CELL)) {
      C::decode(codes, scale, x);
    } else {
      std::array<typename C::Code, CELL> copy{};
      std::copy_n(codes, n, copy.begin());
      C::decode(copy.data(), scale, x);
    }
  }
}

template <Format FORMAT>
void encode(float* x, void* to, float* scales, int64_t n, const Chance& chance) {
  using C = Codec<FORMAT>;
  const int64_t cells = (n + CELL - 1) / CELL, whole = n / CELL;
  std::fill(x + n, x + cells * CELL, 0.f);
  // Before all else, as a cell that has to wait for its largest number keeps those behind it waiting.
  for (int64_t cell = 0; C::SCALED && cell < cells; ++cell) scales[cell] = largest(x + cell * CELL);
  for (int64_t cell = 0; cell < cells; ++cell) {
    auto* codes = static_cast<typename C::Code*>(to) + cell * CELL;
    std::array<typename C::Code, CELL> copy;
    const float top = C::SCALED ? scales[cell] : 0;
    const float scale = C::encode(x + cell * CELL, cell < whole ? codes : copy.data(), top,
                                  Chance{chance.noise + cell * CELL, chance.left});
    if (C::SCALED) scales[cell] = scale;
    if (cell == whole) std::copy_n(copy.begin(), n - whole * CELL, codes);
  }
}

// One moment of units side by side, as it is stored.
struct Moment {
  Format format;
  void* codes;    // or numbers, where the format is fp32
  float* scales;  // one a cell; none without cells

  // Where `numbers` of them and `cells` of their scales lie behind.
  Moment at(int64_t numbers, int64_t cells) const {
    const int64_t bytes = format == fp32 ? 4 : format == bf16 ? 2 : 1;
    return {format, static_cast<char*>(codes) + numbers * bytes, scales ? scales + cells : nullptr};
  }

  // The first n in fp32: themselves, or in `scratch` [n, rounded up to cells].
  float* load(float* scratch, int64_t n) const {
    if (format == fp32) return static_cast<float*>(codes);
    if (format == bf16) decode<bf16>(codes, scales, scratch, n);
    if (format == int8) decode<int8>(codes, scales, scratch, n);
    if (format == e4m4) decode<e4m4>(codes, scales, scratch, n);
    return scratch;
  }

  // Stores what `load` gave, and puts what was stored in its place.
  void keep(float* x, int64_t n, const Chance& chance) const {
    if (format == bf16) encode<bf16>(x, codes, scales, n, chance);
    if (format == int8) encode<int8>(x, codes, scales, n, chance);
    if (format == e4m4) encode<e4m4>(x, codes, scales, n, chance);
  }
};

}  // namespace
