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

enum Phase : int64_t { NORMS = 1, SEND = 2, KEEP = 3 };

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

// As `add_norms`; u [groups * V * 2**L] takes what is sent.
template <int L, typename G, typename U>
void send(const Formula& formula, double gain, const G* x, float* m, U* u, int64_t groups) {
  const Vec gain_of_mean(std::pow(2.0, -L / 2.0));
  const typename Formula::template Vectors<L> its(formula, gain);
  for (int64_t g = 0; g < groups; ++g, m += V) {
    prefetch<L, 1024>(x);
    Vec exp_avg = Vec::loadu(m);
    const Vec of_unit = its.update(exp_avg, unit_sums<L, false>(x).x * gain_of_mean);
    exp_avg.store(m);
    if constexpr (std::is_same_v<U, BFloat16>) {
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
INLINE void take(W* w, const U* o, const Vec& size, const Vec& decay_factor) {
  store(w, written(load(w), load(o) * size, decay_factor));
}

// w, o [elements].
template <typename W, typename U>
void keep(float size, float decay_factor, W* w, const U* o, int64_t elements) {
  const Vec its_size(size), its_factor(decay_factor);
  const int64_t whole = elements / V * V, rest = elements - whole;
  for (int64_t i = 0; i < whole; i += V) take(w + i, o + i, its_size, its_factor);
  if (rest) {
    std::array<W, V> ws{};
    std::array<U, V> os{};
    std::copy_n(w + whole, rest, ws.begin());
    std::copy_n(o + whole, rest, os.begin());
    take(ws.data(), os.data(), its_size, its_factor);
    std::copy_n(ws.begin(), rest, w + whole);
  }
}

// Up to V units in a padded copy: their elements lie at `x`, and those at lead..lead+held of them go to `u`.
template <int L, int64_t PHASE, typename G, typename U>
void run_padded(const Formula& formula, double gain, const G* x, int64_t elements, float* m, U* u, int64_t lead,
                int64_t held, int64_t units, Squares& squares) {
  std::array<G, V << L> xs{};
  std::array<float, V> ms{};
  std::copy_n(x, elements, xs.begin());
  std::copy_n(m, units, ms.begin());
  if constexpr (PHASE == NORMS) {
    if (lead == 0) add_norms<L>(xs.data(), ms.data(), 1, squares);  // else another rank owns the unit
  } else {
    std::array<U, V << L> us;
    send<L>(formula, gain, xs.data(), ms.data(), us.data(), 1);
    std::copy_n(us.begin() + lead, held, u);
    std::copy_n(ms.begin(), units, m);
  }
}

}  // namespace
