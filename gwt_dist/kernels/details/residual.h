// The residual of an element as a gradient of its own, bounded by its square: gwt_dist/formulas/residual.py.

#pragma once

#include "../rule.h"
#include "../vectors.h"

namespace {

struct Detail {
  double size;  // of the update
  float first, second, eps;  // what corrects the moments

  explicit Detail(const Rule& rule)
      : size(rule[number::lr]),
        first(1 / rule.first_weight()),
        second(1 / rule.second_weight()),
        eps(rule[number::eps]) {}

  template <int L>
  struct Vectors {
    static constexpr int FACTORS = 3;
    using Factors = std::array<Vec, FACTORS>;

    const Vec mean, size, first, second, eps;

    Vectors(const Detail& its, float size)
        : mean(std::pow(2.0, -L / 2.0)), size(size), first(its.first), second(its.second), eps(its.eps) {}

    // Mean and corrected moments of a unit.
    INLINE Factors factors(const Vec&, const Vec& exp_avg_sq, const Vec& n, const Vec& a) const {
      return {a * mean, n * first * mean, exp_avg_sq * second};
    }

    INLINE Vec change(const Vec& x, const Factors& of_unit) const {
      const Vec r = x - of_unit[0];
      return (r + of_unit[1]) / ((r * r + of_unit[2]).sqrt() + eps) * size;
    }
  };
};

}  // namespace
