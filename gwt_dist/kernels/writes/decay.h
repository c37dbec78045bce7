// Decoupled weight decay: `decay` of gwt_dist/formulas/weights.py.

#pragma once

#include "../vectors.h"

namespace {

INLINE Vec written(const Vec& weight, const Vec& change, const Vec& decay_factor) {
  return (weight - change) * decay_factor;
}

}  // namespace
