// Momentum that travels to be orthogonalized: what gwt_dist/formulas/orthogonal.py does on units and elements.

#pragma once

#include <cmath>

#include "../rule.h"
#include "../vectors.h"

namespace {

struct Formula {
  float beta1, rest1, first_weight;
  bool nesterov, coherent;
  double before, least;  // of `coherence`: how much of all gradients was in the momentum before this step; least gain
  double size;

  explicit Formula(const Rule& rule)
      : beta1(rule[number::beta1]),
        rest1(1 - rule[number::beta1]),
        first_weight(rule.first_weight()),
        nesterov(rule.nesterov()),
        coherent(rule[number::coherent] != 0),
        before(1 - std::pow(rule[number::beta1], rule.t - 1)),
        least(rule[number::detail_gain]),
        size(rule[number::scale]) {}

  // `coherence` of a whole matrix, if its details go by it. NaN stays NaN.
  double detail_gain(double squared_norm_m, double squared_norm_a) const {
    if (!coherent) return least;
    const bool known = before > 0 && squared_norm_a > 0;
    double gain = known ? squared_norm_m / (before * before * squared_norm_a) : 0;
    gain = gain > 1 ? 1 : gain;
    return gain < least ? least : gain;
  }

  // What an element of O is multiplied with in `write`, in a matrix whose larger side is `side`.
  double lost(double lr, int64_t side) const { return lr * (size * std::sqrt(static_cast<double>(side))); }

  // What V units of one matrix need of `momentum`, in vectors.
  template <int L>
  struct Vectors {
    const Vec mean, beta1, rest1, first_weight, gain;
    const bool nesterov;

    Vectors(const Formula& its, double gain)
        : mean(std::pow(2.0, -L / 2.0)),
          beta1(its.beta1),
          rest1(its.rest1),
          first_weight(its.first_weight),
          gain(L ? gain : 0),  // there are no details
          nesterov(its.nesterov) {}

    // Adds this step's approximation to the momentum.
    INLINE Vec updated(const Vec& exp_avg, const Vec& a) const { return exp_avg * beta1 + a * rest1; }

    // What all elements of a unit have in common.
    INLINE Vec common(const Vec& exp_avg, const Vec& a) const {
      const Vec read = nesterov ? exp_avg * beta1 + a * rest1 : exp_avg;
      return read / first_weight * mean - a * mean * gain;
    }

    // U of elements.
    INLINE Vec sent(const Vec& x, const Vec& of_unit) const { return x * gain + of_unit; }
  };
};

}  // namespace
