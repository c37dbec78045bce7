// A step on runs of Haar units of 2**L elements: moments, weights or both.
//
// A group is V neighbouring units, U * V elements; every unit is handled as a lane of a group, the last ones of a row and
// cut units in a padded copy. Only single additions, multiplications, divisions and square roots are used, in the order of
// gwt_dist/formulas (built with -ffp-contract=off), so a unit has the bits of the reference wherever it lies and however
// many threads there are.
//
// The second moment is that of `Formula`, the change of an element that of `Detail`, and `written` says how a weight takes
// it; the build chooses their headers.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>

#include "groups.h"
#include "rule.h"

#include GWT_HEADER(formulas, GWT_FORMULA)
#include GWT_HEADER(details, GWT_DETAIL)
#include GWT_HEADER(writes, GWT_WRITE)

namespace {

enum Phase : int64_t { MOMENTS = 1, WRITE = 2, STEP = 3, NORM = 4 };  // MOMENTS has the norm in it if there is one

// A rule at one step, in the precision of the units.
struct Step {
  float beta1, rest1, beta2, rest2, eps, decay_factor;
  bool nesterov;
  uint32_t t, seed;
  double scale, limiter;
  Detail detail;

  explicit Step(const Rule& rule)
      : beta1(rule[number::beta1]),
        rest1(1 - rule[number::beta1]),
        beta2(rule[number::beta2]),
        rest2(1 - rule[number::beta2]),
        eps(rule[number::eps]),
        decay_factor(rule.decay_factor()),
        nesterov(rule.nesterov()),
        t(rule.t),
        seed(rule[number::rounding_seed]),
        scale(rule.leveled ? rule[number::scale] : 1),
        limiter(rule[number::limiter]),
        detail(rule) {}
};

// Weights of V units: x, w [V * 2**L].
template <int L, typename D, typename W, typename G>
INLINE void write(const D& detail, const UnitFactors<D::FACTORS>& units, const Vec& decay_factor, const G* x, W* w,
                  Rounding& rounding) {
  const typename D::Factors all = units.load();
  if constexpr (L > 0 && std::is_same_v<W, BFloat16>) {
#pragma GCC unroll 4
    for (int j = 0; j < (1 << L) / 2; ++j, x += 2 * V, w += 2 * V) {  // both elements of a pair belong to one unit
      const typename D::Factors its = spread_all<L - 1>(all, j);
      const Pairs gradient = load_pairs(x), weight = load_pairs(w);
      rounding.put_pairs(w, {written(weight.even, detail.change(gradient.even, its), decay_factor),
                             written(weight.odd, detail.change(gradient.odd, its), decay_factor)});
    }
  } else {
#pragma GCC unroll 8
    for (int j = 0; j < (1 << L); ++j, x += V, w += V) {
      rounding.put(w, written(load(w), detail.change(load(x), spread_all<L>(all, j)), decay_factor));
    }
  }
}

// `groups` groups of V units each: x, w [groups * V * 2**L], m, v [groups * V]. `counts` holds the number of real elements
// of each unit of a single group; without it all have 2**L. Approximations go to `as` [groups * V] if that is given, or
// where moments are not updated come from there.
template <int L, int64_t PHASE, typename W, typename G>
void run(const Step& step, const G* x, W* w, float* m, float* v, int64_t groups, const float* counts, float size,
         Lanes* norm, Rounding rounding, float* as) {
  constexpr int64_t U = 1 << L;
  constexpr bool SQUARES = Formula::SQUARES && (PHASE & MOMENTS);
  using D = Detail::Vectors<L>;
  const D detail(step.detail, size);
  const Vec gain_of_mean(std::pow(2.0, -L / 2.0)), one_of_unit(std::pow(2.0, -L)), decay_factor(step.decay_factor);
  const Vec beta1(step.beta1), rest1(step.rest1), beta2(step.beta2), rest2(step.rest2), eps(step.eps);
  const bool nesterov = L && step.nesterov;
  Lanes lanes{};
  std::array<UnitFactors<D::FACTORS>, PHASE & WRITE ? BLOCK<L> : 1> block;
  for (int64_t first = 0; first < groups; first += BLOCK<L>) {
    const int64_t n = std::min<int64_t>(BLOCK<L>, groups - first);
    for (int64_t g = 0; g < n; ++g, m += V, v += V) {
      // Gradients in bf16 come early enough by themselves, and a step in bf16 has no instruction to spare.
      if constexpr (std::is_same_v<G, float>) prefetch<L, 1024>(x + g * U * V);
      if constexpr (PHASE & WRITE) prefetch<L, 512>(w + g * U * V);
      Sums sums;
      Vec a;
      if (PHASE == WRITE && as) {
        a = Vec::loadu(as);
      } else {
        sums = unit_sums<L, SQUARES>(x + g * U * V);
        a = sums.x * gain_of_mean;
      }
      if (PHASE == MOMENTS && as) a.store(as);
      if (PHASE != STEP && as) as += V;
      Vec exp_avg = Vec::loadu(m), exp_avg_sq = Vec::loadu(v);
      if constexpr (PHASE & MOMENTS) {
        // A product with a power of two has the bits of the quotient.
        const Vec mean_square = counts ? sums.squares / Vec::loadu(counts) : sums.squares * one_of_unit;
        exp_avg = exp_avg * beta1 + a * rest1;
        exp_avg_sq = exp_avg_sq * beta2 + Formula::second(a, mean_square) * rest2;
        exp_avg.store(m);
        exp_avg_sq.store(v);
      }
      Vec read = exp_avg;  // `moments.read`
      if (C10_UNLIKELY(nesterov)) read = exp_avg * beta1 + a * rest1;
      if constexpr (PHASE == MOMENTS || PHASE == NORM) {
        if (norm) {
          float values[V];
          (read / (exp_avg_sq.sqrt() + eps)).store(values);
          for (int i = 0; i < V; ++i) lanes[i] += static_cast<double>(values[i]) * static_cast<double>(values[i]);
        }
      }
      if constexpr (PHASE & WRITE) block[g].keep(detail.factors(exp_avg, exp_avg_sq, read, a));
    }
    if constexpr (PHASE & WRITE) {
      for (int64_t g = 0; g < n; ++g) write<L>(detail, block[g], decay_factor, x + g * U * V, w + g * U * V, rounding);
    }
    x += BLOCK<L> * U * V, w += BLOCK<L> * U * V;
  }
  if (norm) {
    for (int i = 0; i < V; ++i) (*norm)[i] += lanes[i];
  }
}

// Up to V units in a padded copy.
template <int L, int64_t PHASE, typename W, typename G>
void run_padded(const Step& step, const Span<L, W, G>& its, float* m, float* v, float size, Lanes* norm,
                const Rounding& rounding, float* as) {
  constexpr int64_t U = 1 << L;
  std::array<G, U * V> xs{};
  std::array<W, U * V> ws{};
  std::array<float, V> ms{}, vs{}, as_all{}, counts;
  counts.fill(U);
  counts[its.units - 1] = its.last;
  std::copy_n(its.x, its.elements(), xs.begin());
  std::copy_n(m, its.units, ms.begin());
  std::copy_n(v, its.units, vs.begin());
  if (as) std::copy_n(as, its.units, as_all.begin());
  if constexpr (PHASE & WRITE) std::copy_n(its.w, its.held, ws.begin() + its.lead);
  run<L, PHASE>(step, xs.data(), ws.data(), ms.data(), vs.data(), 1, counts.data(), size, norm, rounding,
                as ? as_all.data() : nullptr);
  if (as) std::copy_n(as_all.begin(), its.units, as);
  if constexpr (PHASE & WRITE) std::copy_n(ws.begin() + its.lead, its.held, its.w);
  if constexpr (PHASE & MOMENTS) {
    std::copy_n(ms.begin(), its.units, m);
    std::copy_n(vs.begin(), its.units, v);
  }
}

// All units of a span, whose moments are m, v [units]; `rounding` is at the first element of the first.
template <int L, int64_t PHASE, typename W, typename G>
void run_span(const Step& step, const Span<L, W, G>& its, float* m, float* v, float size, Lanes* norm, Rounding rounding,
              float* as = nullptr) {
  const int64_t groups = its.groups();
  run<L, PHASE>(step, its.x, its.w, m, v, groups, nullptr, size, norm, rounding, as);
  rounding.advance(groups * V << L);
  for (int64_t first = groups * V; first < its.units; first += V, rounding.advance(V << L)) {
    run_padded<L, PHASE>(step, its.part(first, V), m + first, v + first, size, norm, rounding,
                         as ? as + first : nullptr);
  }
}

// As `run_span`, of moments in any format: updated, stored, and only then read.
template <int L, int64_t PHASE, typename W, typename G>
void run_stored(const Step& step, const Span<L, W, G>& all, const Moment& exp_avg, const Moment& exp_avg_sq, Noise noise,
                float size, Lanes* norm, Rounding rounding) {
  alignas(64) float ms[DECODED<L>], vs[DECODED<L>], as[DECODED<L>];
  alignas(64) uint32_t noises[DECODED<L>];
  for (int64_t first = 0; first < all.units; first += DECODED<L>) {
    const Span<L, W, G> its = all.part(first, DECODED<L>);
    const Moment at_m = exp_avg.at(first, first / CELL), at_v = exp_avg_sq.at(first, first / CELL);
    float *m = at_m.load(ms, its.units), *v = at_v.load(vs, its.units);
    const Span<L, float, G> unweighted{its.x, nullptr, its.units, its.last, 0, its.elements()};
    if constexpr (PHASE & MOMENTS) {
      run_span<L, MOMENTS>(step, unweighted, m, v, size, nullptr, rounding, as);
      Noise(noise).take(noises, (its.units + CELL - 1) / CELL * CELL);
      at_m.keep(m, its.units, {noises, 0});
      at_v.keep(v, its.units, {noises, 16});
      if (norm) run_span<L, NORM>(step, unweighted, m, v, size, norm, rounding);
    }
    if constexpr (PHASE & WRITE) {
      run_span<L, WRITE>(step, its, m, v, size, nullptr, rounding, PHASE & MOMENTS ? as : nullptr);
    }
    noise.advance(DECODED<L>), rounding.advance(DECODED<L> << L);
  }
}

}  // namespace
