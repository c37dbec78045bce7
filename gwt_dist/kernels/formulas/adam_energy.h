// Adam whose second moment is of the mean square of a unit.

#pragma once

#include "../vectors.h"

namespace {

struct Formula {
  static constexpr bool SQUARES = true;  // asks for `mean_square`

  static INLINE Vec second(const Vec& a, const Vec& mean_square) { return mean_square; }
};

}  // namespace
