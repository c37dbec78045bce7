// Adam whose second moment is of the square of the approximation.

#pragma once

#include "../vectors.h"

namespace {

struct Formula {
  static constexpr bool SQUARES = false;

  static INLINE Vec second(const Vec& a, const Vec& mean_square) { return a * a; }
};

}  // namespace
