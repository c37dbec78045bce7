// Vectors of V whole numbers of 32 bits, and the narrow ones in memory that they are read from and stored to.
//
// They are the compiler's own vectors, whose operators every instruction set has; only what widens and narrows is written
// for AVX2 and AVX-512.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "vectors.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors of another width have no part in calls between libraries

namespace {

typedef uint32_t Bits __attribute__((vector_size(4 * V)));
typedef int32_t Whole __attribute__((vector_size(4 * V)));  // and what comparisons say, -1 for true
typedef float Floats __attribute__((vector_size(4 * V)));

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

// V numbers of 8 or 16 bits.
template <typename T>
struct Narrow {
  typedef T Vector __attribute__((vector_size(sizeof(T) * V)));
};

template <typename T>
INLINE Whole widened(const T* p) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (sizeof(T) == 2) return (Whole)_mm512_cvtepu16_epi32(loaded<__m256i>(p));
  const __m128i x = loaded<__m128i>(p);
  return (Whole)(std::is_signed_v<T> ? _mm512_cvtepi8_epi32(x) : _mm512_cvtepu8_epi32(x));
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (sizeof(T) == 2) return (Whole)_mm256_cvtepu16_epi32(loaded<__m128i>(p));
  const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (Whole)(std::is_signed_v<T> ? _mm256_cvtepi8_epi32(x) : _mm256_cvtepu8_epi32(x));
#else
  return __builtin_convertvector(loaded<typename Narrow<T>::Vector>(p), Whole);
#endif
}

// Of numbers that T has.
template <typename T>
INLINE void store_narrow(T* p, const Whole& x) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (sizeof(T) == 2) {
    stored(p, _mm512_cvtepi32_epi16((__m512i)x));
  } else {
    stored(p, _mm512_cvtepi32_epi8((__m512i)x));
  }
#elif defined(CPU_CAPABILITY_AVX2)
  const __m128i low = _mm256_castsi256_si128((__m256i)x), high = _mm256_extracti128_si256((__m256i)x, 1);
  if constexpr (sizeof(T) == 2) {
    stored(p, _mm_packus_epi32(low, high));
  } else {
    const __m128i both = _mm_packs_epi32(low, high);
    const __m128i bytes = std::is_signed_v<T> ? _mm_packs_epi16(both, both) : _mm_packus_epi16(both, both);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes);
  }
#else
  stored(p, __builtin_convertvector(x, typename Narrow<T>::Vector));
#endif
}

INLINE Floats floored(const Floats& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return (Floats)_mm512_floor_ps((__m512)x);
#elif defined(CPU_CAPABILITY_AVX2)
  return (Floats)_mm256_floor_ps((__m256)x);
#else
  const Whole towards_zero = __builtin_convertvector(x, Whole);
  return __builtin_convertvector(towards_zero + (__builtin_convertvector(towards_zero, Floats) > x), Floats);
#endif
}

INLINE Floats root(const Floats& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return (Floats)_mm512_sqrt_ps((__m512)x);
#elif defined(CPU_CAPABILITY_AVX2)
  return (Floats)_mm256_sqrt_ps((__m256)x);
#else
  Floats found;
  for (int i = 0; i < V; ++i) found[i] = std::sqrt(x[i]);
  return found;
#endif
}

INLINE int32_t largest_lane(const Whole& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_reduce_max_epi32((__m512i)x);
#else
  int32_t found = x[0];
  for (int i = 1; i < V; ++i) found = x[i] > found ? x[i] : found;
  return found;
#endif
}

}  // namespace
