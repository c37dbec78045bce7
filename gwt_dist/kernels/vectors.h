// Vectors of fp32 for `cpu.cpp`: loads and stores in fp32 and bf16, and sums over units of 2**L neighbours.
//
// Vec holds V floats. What moves lanes is written for AVX2 and AVX-512, with a portable form in ATen's vectors.

#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <type_traits>

namespace {

using at::BFloat16;
using Vec = at::vec::Vectorized<float>;
constexpr int V = Vec::size();
#define INLINE C10_ALWAYS_INLINE  // a call in the inner loop costs a third of it

INLINE Vec load(const float* p) { return Vec::loadu(p); }

INLINE Vec load(const BFloat16* p) {
  Vec x;
  at::vec::load_fp32_from_bf16(p, x);
  return x;
}

INLINE void store(float* p, const Vec& x) { x.store(p); }

INLINE void store(BFloat16* p, const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), at::vec::cvtfp32_bf16(static_cast<__m512>(x)));
#elif defined(CPU_CAPABILITY_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), at::vec::cvtfp32_bf16(static_cast<__m256>(x)));
#else
  float lanes[V];
  x.store(lanes);
  for (int i = 0; i < V; ++i) p[i] = lanes[i];
#endif
}

// Elements 0, 2, 4 ... and 1, 3, 5 ... of 2 * V.
struct Pairs {
  Vec even, odd;
};

template <typename T>
INLINE Pairs load_pairs(const T* p) {
  const auto [even, odd] = at::vec::deinterleave2(load(p), load(p + V));
  return {even, odd};
}

template <typename T>
INLINE void store_pairs(T* p, const Pairs& x) {
  const auto [low, high] = at::vec::interleave2(x.even, x.odd);
  store(p, low), store(p + V, high);
}

// Two bf16 lie in the place of one float, the even one in its low half: no lane has to move.
#if defined(CPU_CAPABILITY_AVX512)
template <>
INLINE Pairs load_pairs(const BFloat16* p) {
  const __m512i both = _mm512_loadu_si512(p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)))};
}

// The upper half rounded to nearest, ties to even, as torch does; a NaN is all ones.
INLINE __m512i rounded(const Vec& x) {
  const __m512i i = _mm512_castps_si512(x);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(i, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(0x7fff)), even);
  return _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(-1));
}

template <>
INLINE void store_pairs(BFloat16* p, const Pairs& x) {
  const __m512i low = _mm512_srli_epi32(rounded(x.even), 16);
  _mm512_storeu_si512(p, _mm512_mask_mov_epi16(low, 0xaaaaaaaa, rounded(x.odd)));
}
#elif defined(CPU_CAPABILITY_AVX2)
template <>
INLINE Pairs load_pairs(const BFloat16* p) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(0xffff0000)))};
}

INLINE __m256i rounded(const Vec& x) {
  const __m256i i = _mm256_castps_si256(x);
  const __m256i even = _mm256_and_si256(_mm256_srli_epi32(i, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(i, _mm256_set1_epi32(0x7fff)), even);
  return _mm256_or_si256(up, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}

template <>
INLINE void store_pairs(BFloat16* p, const Pairs& x) {
  const __m256i low = _mm256_srli_epi32(rounded(x.even), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(low, rounded(x.odd), 0xaa));
}
#endif

// Lanes of `units` for the elements of vector j of a group: lane i belongs to unit (j * V + i) >> L.
template <int L>
INLINE Vec spread(const Vec& units, int j) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(j * V)), L), units);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i i = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_permutevar8x32_ps(units, _mm256_srli_epi32(_mm256_add_epi32(i, _mm256_set1_epi32(j * V)), L));
#else
  float lanes[V], spread[V];
  units.store(lanes);
  for (int i = 0; i < V; ++i) spread[i] = lanes[(j * V + i) >> L];
  return Vec::loadu(spread);
#endif
}

// Elements 0, 2, 4 ... of both, and 1, 3, 5 ..., in whatever order takes the fewest shuffles; `in_order` puts right what
// `times` such steps have done to the order.
INLINE Pairs neighbours(const Vec& low, const Vec& high) {
#if defined(CPU_CAPABILITY_AVX2) && !defined(CPU_CAPABILITY_AVX512)
  return {_mm256_shuffle_ps(low, high, 0x88), _mm256_shuffle_ps(low, high, 0xdd)};
#else
  const auto [even, odd] = at::vec::deinterleave2(low, high);
  return {even, odd};
#endif
}

template <int times>
INLINE Vec in_order(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX2) && !defined(CPU_CAPABILITY_AVX512)
  if constexpr (times == 1) return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8));
  if constexpr (times == 2) return _mm256_permutevar8x32_ps(x, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
#endif
  return x;
}

struct Sums {
  Vec x, squares;
};

template <int times, bool SQUARES>
INLINE Sums in_order(const Sums& sums) {
  return {in_order<times>(sums.x), SQUARES ? in_order<times>(sums.squares) : sums.x};
}

template <bool SQUARES>
INLINE Sums added(const Sums& low, const Sums& high) {
  const Pairs x = neighbours(low.x, high.x);
  if constexpr (!SQUARES) return {x.even + x.odd, x.even};
  const Pairs squares = neighbours(low.squares, high.squares);
  return {x.even + x.odd, squares.even + squares.odd};
}

// Sums of V pairs, and of their squares, as `neighbours` orders them.
template <bool SQUARES>
INLINE Sums pair_sums(const float* x) {
  const Pairs pair = neighbours(load(x), load(x + V));
  return {pair.even + pair.odd, SQUARES ? pair.even * pair.even + pair.odd * pair.odd : pair.even};
}

template <int L, bool SQUARES, typename G>
INLINE Sums unit_sums(const G* x);

// As `unit_sums`, in one place for all phases: the compiler takes long over a large unit, and a call is nothing beside it.
template <int L, bool SQUARES, typename G>
C10_NOINLINE Sums unit_sums_called(const G* x) {
  return unit_sums<L, SQUARES>(x);
}

// Sums of V units of 2**L elements, and of their squares, each a tree of neighbours as `wavelet.unit_sum`.
template <int L, bool SQUARES, typename G>
INLINE Sums unit_sums(const G* x) {
  if constexpr (L == 0) {
    const Vec one = load(x);
    return {one, SQUARES ? one * one : one};
  } else if constexpr (L == 1 && std::is_same_v<G, float>) {
    return in_order<1, SQUARES>(pair_sums<SQUARES>(x));
  } else if constexpr (L == 1) {
    const auto [even, odd] = load_pairs(x);
    return {even + odd, SQUARES ? even * even + odd * odd : even};
  } else if constexpr (L == 2 && std::is_same_v<G, float>) {
    return in_order<2, SQUARES>(added<SQUARES>(pair_sums<SQUARES>(x), pair_sums<SQUARES>(x + 2 * V)));
  } else {
    constexpr auto half = L > 4 ? unit_sums_called<L - 1, SQUARES, G> : unit_sums<L - 1, SQUARES, G>;
    return in_order<1, SQUARES>(added<SQUARES>(half(x), half(x + (V << (L - 1)))));
  }
}

}  // namespace
