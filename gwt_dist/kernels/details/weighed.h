// Details of a unit over the denominator of the unit, times one gain: gwt_dist/formulas/weighed.py.

#pragma once

#include "../rule.h"
#include "../vectors.h"

namespace {

struct Detail {
  double size;                      // of the update: `moments.step_size`
  float rest1, eps;
  float least, steady, most;        // gain of the details; factor and limit of the coherence
  bool coherent;

  explicit Detail(const Rule& rule)
      : size(std::sqrt(rule.second_weight()) / rule.first_weight() * rule[number::lr]),
        rest1(1 - rule[number::beta1]),
        eps(rule[number::eps]),
        least(rule.leveled ? rule[number::detail_gain] : 0),
        most(rule.first_weight()),
        coherent(rule.leveled && rule[number::coherent] != 0) {
    const double before = rule.whole1() - (1 - rule[number::beta1]);
    steady = rule.t > 1 && before > 0 ? rule.first_weight() * rule.whole2() / (before * before) : 0;
  }

  // What V units need, in vectors; `size` is what all changes are multiplied with.
  template <int L>
  struct Vectors {
    static constexpr int FACTORS = 2;  // numbers of a unit that its elements ask for
    using Factors = std::array<Vec, FACTORS>;

    const Vec mean, one, size, rest1, eps, least, steady, most;
    const bool coherent;

    Vectors(const Detail& its, float size)
        : mean(std::pow(2.0, -L / 2.0)), one(1.f), size(size), rest1(its.rest1), eps(its.eps), least(its.least),
          steady(its.steady), most(its.most), coherent(its.coherent) {}

    // n is the momentum that the update reads, a this step's approximation.
    INLINE Factors factors(const Vec& exp_avg, const Vec& exp_avg_sq, const Vec& n, const Vec& a) const {
      const Vec inverse = one / (exp_avg_sq.sqrt() + eps), size_of_unit = inverse * size;
      Vec gain = least;
      if (coherent) {  // `weighed.coherence`
        const Vec before = (exp_avg - a * rest1) * inverse;
        gain = at::vec::clamp_min(at::vec::clamp_max(before * before * steady, most), least);
      }
      const Vec details = size_of_unit * gain;
      return {details, n * mean * size_of_unit - a * mean * details};
    }

    INLINE Vec change(const Vec& x, const Factors& of_unit) const { return x * of_unit[0] + of_unit[1]; }
  };
};

}  // namespace
