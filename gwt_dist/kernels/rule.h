// The numbers of a parameter group, and what they come to at one step.
//
// Their order is that of `Program.numbers`, behind lr: the build hands it over as GWT_NUMBERS.

#pragma once

#include <array>
#include <cmath>

namespace {

namespace number {
enum : int { lr, GWT_NUMBERS, COUNT };
}

using Numbers = std::array<double, number::COUNT>;

// One rule at step t, for units with details (leveled) or without.
struct Rule {
  const Numbers& numbers;
  double t;
  bool leveled;

  double operator[](int which) const { return numbers[which]; }

  // How much of all gradients there is in a moment by now.
  double whole1() const { return 1 - std::pow(numbers[number::beta1], t); }
  double whole2() const { return 1 - std::pow(numbers[number::beta2], t); }

  // What weight decay leaves of a weight.
  double decay_factor() const { return 1 - numbers[number::lr] * numbers[number::weight_decay]; }

  bool nesterov() const { return leveled && numbers[number::nesterov] != 0; }

  // `moments.first_weight`, and the same of the second moment: 1 without correction of bias.
  double first_weight() const {
    if (numbers[number::correct_bias] == 0) return 1;
    return 1 - std::pow(numbers[number::beta1], nesterov() ? t + 1 : t);
  }
  double second_weight() const { return numbers[number::correct_bias] == 0 ? 1 : whole2(); }
};

}  // namespace
