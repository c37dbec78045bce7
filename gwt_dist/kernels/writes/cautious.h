// A weight decays only where its change does not take it away from zero: `cautious` of gwt_dist/formulas/weights.py.

#pragma once

#include "../vectors.h"

namespace {

INLINE Vec written(const Vec& weight, const Vec& change, const Vec& decay_factor) {
  const Vec agrees = weight * change >= Vec(0.f), moved = weight - change;
  return Vec::blendv(moved, moved * decay_factor, agrees);
}

}  // namespace
