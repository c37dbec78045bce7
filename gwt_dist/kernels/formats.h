// How state is stored, gwt_dist/formulas/codecs.py in vectors: moments in fp32, or as codes of cells of 64 with a scale each.
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

// The largest size of numbers of a cell, as bits: NaN and infinity are larger than all others.
INLINE uint32_t largest(const float* x) {
  Whole most{};
  for (int64_t i = 0; i < CELL; i += V) {
    const Whole its = (Whole)(loaded<Bits>(x + i) & SIZE);
    most = its > most ? its : most;
  }
  return largest_lane(most);
}

template <typename To, typename From>
INLINE To same_bits(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  return loaded<To>(&x);
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

  static INLINE float encode(float* x, Code* codes, Noise& noise) {
    for (int64_t i = 0; i < CELL; i += V) {
      const Bits upper = rounded_by(loaded<Bits>(x + i), noise.next()) >> 16;
      store_narrow(codes + i, (Whole)upper);
      stored(x + i, upper << 16);
    }
    return 0;
  }
};

// Companded: codes of small numbers are twice as dense as those of the largest.
template <>
struct Codec<int8> {
  using Code = int8_t;
  static constexpr bool SCALED = true;
  static constexpr int32_t LARGEST = 127;

  static INLINE Floats size_of(const Floats& x) { return (Floats)((Bits)x & SIZE); }

  static INLINE Floats decoded(const Whole& code, float scale) {
    const Floats its = __builtin_convertvector(code, Floats);
    return its / (2.f * LARGEST - size_of(its)) * scale;
  }

  static INLINE void decode(const Code* codes, float scale, float* x) {
    for (int64_t i = 0; i < CELL; i += V) stored(x + i, decoded(widened(codes + i), scale));
  }

  static INLINE float encode(float* x, Code* codes, Noise& noise) {
    const float scale = same_bits<float>(largest(x)), inverse = 1 / scale;
    const bool known = scale >= std::numeric_limits<float>::min() && scale < std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < CELL; i += V) {
      const Whole upper = (Whole)(noise.next() >> 16);
      const Floats y = loaded<Floats>(x + i) * inverse, z = y * (2.f * LARGEST) / (size_of(y) + 1.f);
      const Floats up = z + __builtin_convertvector(upper, Floats) * 0x1p-16f;
      Whole code = __builtin_convertvector(up, Whole);  // towards zero
      code += __builtin_convertvector(code, Floats) > up;
      code = code < -LARGEST ? -LARGEST : code;
      code = code > LARGEST ? LARGEST : code;
      code = known ? code : Whole{};
      store_narrow(codes + i, code);
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

  static INLINE float encode(float* x, Code* codes, Noise& noise) {
    const int32_t exponent = largest(x) >> 23;
    const bool known = exponent >= 32 && exponent < 255;
    const float scale = exponent >= 32 ? same_bits<float>(exponent << 23) : 0;
    for (int64_t i = 0; i < CELL; i += V) {
      const Bits up = loaded<Bits>(x + i) + (noise.next() >> 13);
      Whole code = (Whole)(up >> 19) - ((exponent - 15) << 4);
      code = code < 0 ? 0 : code;
      code = code > 255 ? 255 : code;
      code = known ? code : Whole{};
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
void encode(float* x, void* to, float* scales, int64_t n, Noise noise) {
  using C = Codec<FORMAT>;
  auto* codes = static_cast<typename C::Code*>(to);
  for (; n > 0; n -= CELL, codes += CELL, x += CELL) {
    float scale;
    if (C10_LIKELY(n >= CELL)) {
      scale = C::encode(x, codes, noise);
    } else {
      std::array<typename C::Code, CELL> copy;
      std::fill(x + n, x + CELL, 0.f);
      scale = C::encode(x, copy.data(), noise);
      std::copy_n(copy.begin(), n, codes);
    }
    if (C::SCALED) *scales++ = scale;
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
  void keep(float* x, int64_t n, const Noise& noise) const {
    if (format == bf16) encode<bf16>(x, codes, scales, n, noise);
    if (format == int8) encode<int8>(x, codes, scales, n, noise);
    if (format == e4m4) encode<e4m4>(x, codes, scales, n, noise);
  }
};

}  // namespace
