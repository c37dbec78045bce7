// Units and elements of matrices that travel: the sums before it, what is sent of units, what weights take of it back.
//
// Single operations in the order of gwt_dist/formulas, as in `units.h`: what is sent of a unit has the bits of the
// reference wherever it lies and however many threads there are. The mathematics is that of `Formula`, and `written` says
// how a weight takes its change; the build chooses their headers.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>

#include "groups.h"
#include "rule.h"

#include GWT_HEADER(formulas, GWT_FORMULA)
#include GWT_HEADER(writes, GWT_WRITE)

namespace {

enum Phase : int64_t { NORMS = 1, SEND = 2, KEEP = 3, UPDATE = 4, READ = 5 };  // SEND is UPDATE and READ at once

// Of the momentum before this step, and of its approximation.
using Squares = std::array<Lanes, 2>;

INLINE void add_squares(Lanes& lanes, const Vec& x) {
  float values[V];
  x.store(values);
  for (int i = 0; i < V; ++i) lanes[i] += static_cast<double>(values[i]) * static_cast<double>(values[i]);
}

// `groups` groups of V units each: x [groups * V * 2**L], m [groups * V].
template <int L, typename G>
void add_norms(const G* x, const float* m, int64_t groups, Squares& squares) {
  const Vec gain_of_mean(std::pow(2.0, -L / 2.0));
  Squares its{};
  for (int64_t g = 0; g < groups; ++g, x += V << L, m += V) {
    prefetch<L, 1024>(x);
    add_squares(its[0], Vec::loadu(m));
    add_squares(its[1], unit_sums<L, false>(x).x * gain_of_mean);
  }
  for (int which = 0; which < 2; ++which) {
    for (int i = 0; i < V; ++i) squares[which][i] += its[which][i];
  }
}

// As `add_norms`: the momentum takes this step's approximation.
template <int L, typename G>
void update(const Formula& formula, const G* x, float* m, int64_t groups) {
  const Vec gain_of_mean(std::pow(2.0, -L / 2.0));
  const typename Formula::template Vectors<L> its(formula, 0);
  for (int64_t g = 0; g < groups; ++g, x += V << L, m += V) {
    prefetch<L, 1024>(x);
    its.updated(Vec::loadu(m), unit_sums<L, false>(x).x * gain_of_mean).store(m);
  }
}

// As `add_norms`; u [groups * V * 2**L] takes what is sent, of a momentum that is updated first, or was.
template <int L, typename G, typename U>
void send(const Formula& formula, double gain, const G* x, float* m, U* u, int64_t groups, bool updated) {
  const Vec gain_of_mean(std::pow(2.0, -L / 2.0));
  const typename Formula::template Vectors<L> its(formula, gain);
  for (int64_t g = 0; g < groups; ++g, m += V) {
    prefetch<L, 1024>(x);
    const Vec a = unit_sums<L, false>(x).x * gain_of_mean;
    Vec exp_avg = Vec::loadu(m);
    if (!updated) {
      exp_avg = its.updated(exp_avg, a);
      exp_avg.store(m);
    }
    const Vec of_unit = its.common(exp_avg, a);
    if constexpr (L > 0 && std::is_same_v<U, BFloat16>) {
#pragma GCC unroll 4
      for (int j = 0; j < (1 << L) / 2; ++j, x += 2 * V, u += 2 * V) {  // both elements of a pair belong to one unit
        const Vec common = spread<L - 1>(of_unit, j);
        const Pairs pair = load_pairs(x);
        store_pairs(u, {its.sent(pair.even, common), its.sent(pair.odd, common)});
      }
    } else {
#pragma GCC unroll 8
      for (int j = 0; j < (1 << L); ++j, x += V, u += V) store(u, its.sent(load(x), spread<L>(of_unit, j)));
    }
  }
}

// What V weights take of V elements that came back.
template <typename W, typename U>
INLINE void take(W* w, const U* o, const Vec& size, const Vec& decay_factor, Rounding& rounding) {
  rounding.put(w, written(load(w), load(o) * size, decay_factor));
}

// w, o [elements].
template <typename W, typename U>
void keep(float size, float decay_factor, W* w, const U* o, int64_t elements, Rounding rounding) {
  const Vec its_size(size), its_factor(decay_factor);
  const int64_t whole = elements / V * V, rest = elements - whole;
  for (int64_t i = 0; i < whole; i += V) take(w + i, o + i, its_size, its_factor, rounding);
  if (rest) {
    std::array<W, V> ws{};
    std::array<U, V> os{};
    std::copy_n(w + whole, rest, ws.begin());
    std::copy_n(o + whole, rest, os.begin());
    take(ws.data(), os.data(), its_size, its_factor, rounding);
    std::copy_n(ws.begin(), rest, w + whole);
  }
}

// What a pass over units needs beside them.
struct Sent {
  const Formula& formula;
  double gain;
  Squares* squares;  // of NORMS
};

// `groups` groups of V units each.
template <int L, int64_t PHASE, typename G, typename U>
void run_groups(const Sent& all, const G* x, float* m, U* u, int64_t groups) {
  if constexpr (PHASE == NORMS) add_norms<L>(x, m, groups, *all.squares);
  if constexpr (PHASE == UPDATE) update<L>(all.formula, x, m, groups);
  if constexpr (PHASE == SEND || PHASE == READ) send<L>(all.formula, all.gain, x, m, u, groups, PHASE == READ);
}

// All units of a span, whose momentum is m [units].
template <int L, int64_t PHASE, typename G, typename U>
void run_span(const Sent& all, const Span<L, U, G>& span, float* m) {
  const int64_t groups = span.groups();
  run_groups<L, PHASE>(all, span.x, m, span.w, groups);
  for (int64_t first = groups * V; first < span.units; first += V) {  // up to V units in a padded copy
    const Span<L, U, G> its = span.part(first, V);
    std::array<G, V << L> xs{};
    std::array<float, V> ms{};
    std::array<U, V << L> us;
    std::copy_n(its.x, its.elements(), xs.begin());
    std::copy_n(m + first, its.units, ms.begin());
    run_groups<L, PHASE>(all, xs.data(), ms.data(), us.data(), 1);
    if constexpr (PHASE == SEND || PHASE == READ) std::copy_n(us.begin() + its.lead, its.held, its.w);
    if constexpr (PHASE == SEND || PHASE == UPDATE) std::copy_n(ms.begin(), its.units, m + first);
  }
}

// As `run_span`, of momentum in any format: updated, stored, and only then read.
template <int L, int64_t PHASE, typename G, typename U>
void run_stored(const Sent& all, const Span<L, U, G>& span, const Moment& exp_avg, Noise noise) {
  if (exp_avg.format == fp32) {
    run_span<L, PHASE>(all, span, static_cast<float*>(exp_avg.codes));
    return;
  }
  alignas(64) float scratch[DECODED<L>];
  alignas(64) uint32_t noises[DECODED<L>];
  for (int64_t first = 0; first < span.units; first += DECODED<L>, noise.advance(DECODED<L>)) {
    const Span<L, U, G> its = span.part(first, DECODED<L>);
    const Moment at_m = exp_avg.at(first, first / CELL);
    float* m = at_m.load(scratch, its.units);
    if constexpr (PHASE == SEND) {
      const Span<L, float, G> unsent{its.x, nullptr, its.units, its.last, 0, its.elements()};
      run_span<L, UPDATE>(all, unsent, m);
      Noise(noise).take(noises, (its.units + CELL - 1) / CELL * CELL);
      at_m.keep(m, its.units, {noises, 0});
      run_span<L, READ>(all, its, m);
    } else {
      run_span<L, PHASE>(all, its, m);
    }
  }
}

}  // namespace
