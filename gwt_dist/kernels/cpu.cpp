// Both phases of a step on a CPU, for Haar units of 2**L elements, L = 0..8: fp32 mathematics on fp32 or bf16 buffers.
//
// Vec holds V floats. A group is V neighbouring units, U * V elements; every unit is handled as a lane of a group, the
// last ones of a row and cut units in a padded copy. Only single additions, multiplications, divisions and square roots
// are used, in the order of `update.py` (built with -ffp-contract=off), so a unit has the bits of the reference wherever
// it lies and however many threads there are.
//
// What an item of the table means is written down in `work.py`.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/csrc/utils/pybind.h>  // a third of the time to compile of torch/extension.h

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <numeric>
#include <type_traits>
#include <vector>

namespace {

using at::BFloat16;
using Vec = at::vec::Vectorized<float>;
constexpr int V = Vec::size();
constexpr int MAX_LEVEL = 8;

enum Phase : int64_t { MOMENTS = 1, WRITE = 2, STEP = 3 };

struct Item {
  int64_t parameter, level, element, moment, rows, units, last, element_stride, moment_stride, slot, lead, held, norm;
};
constexpr int64_t FIELDS = sizeof(Item) / sizeof(int64_t);

struct Rule {
  float beta1, rest1, beta2, rest2, eps, gain, decay;
  double size, scale;
  bool energy;
};

struct Parameter {
  void *weight, *gradient;
  float *exp_avg, *exp_avg_sq;
  bool weight_bf16, gradient_bf16;
  Rule rule;
};

Vec load(const float* p) { return Vec::loadu(p); }

Vec load(const BFloat16* p) {
  Vec x;
  at::vec::load_fp32_from_bf16(p, x);
  return x;
}

void store(float* p, const Vec& x) { x.store(p); }

void store(BFloat16* p, const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), at::vec::cvtfp32_bf16(static_cast<__m512>(x)));
#elif defined(CPU_CAPABILITY_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), at::vec::cvtfp32_bf16(static_cast<__m256>(x)));
#else
  float lanes[V];
  x.store(lanes);
  for (int i = 0; i < V; ++i) p[i] = lanes[i];
#endif
}

// Lanes of `units` for the elements of vector j of a group: lane i belongs to unit (j * V + i) >> L.
template <int L>
Vec spread(const Vec& units, int j) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_permutexvar_ps(_mm512_srli_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(j * V)), L), units);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i i = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_permutevar8x32_ps(units, _mm256_srli_epi32(_mm256_add_epi32(i, _mm256_set1_epi32(j * V)), L));
#else
  float lanes[V], spread[V];
  units.store(lanes);
  for (int i = 0; i < V; ++i) spread[i] = lanes[(j * V + i) >> L];
  return Vec::loadu(spread);
#endif
}

struct Sums {
  Vec x, squares;
};

// Sums of V units of 2**L elements, and of their squares, each a tree of neighbours as `wavelet.unit_sum`.
template <int L, bool SQUARES, typename G>
Sums unit_sums(const G* x) {
  if constexpr (L == 0) {
    const Vec one = load(x);
    return {one, SQUARES ? one * one : one};
  } else if constexpr (L == 1) {
    const auto [even, odd] = at::vec::deinterleave2(load(x), load(x + V));
    return {even + odd, SQUARES ? even * even + odd * odd : even};
  } else {
    const Sums low = unit_sums<L - 1, SQUARES>(x), high = unit_sums<L - 1, SQUARES>(x + (V << (L - 1)));
    const auto [even, odd] = at::vec::deinterleave2(low.x, high.x);
    if constexpr (!SQUARES) return {even + odd, even};
    const auto [even_squares, odd_squares] = at::vec::deinterleave2(low.squares, high.squares);
    return {even + odd, even_squares + odd_squares};
  }
}

// Squares are added in double, lane by lane; the order depends on nothing but the item.
using Lanes = std::array<double, V>;

// `groups` groups of V units each: x, w [groups * V * 2**L], m, v [groups * V]. With COUNTED, `count` holds the number of
// real elements of each unit; without, all have 2**L.
template <int L, int64_t PHASE, bool ENERGY, bool COUNTED, typename W, typename G>
void run(const Rule& rule, const G* x, W* w, float* m, float* v, int64_t groups, const Vec& count, float factor,
         Lanes* norm) {
  constexpr int64_t U = 1 << L;
  const Vec gain_of_mean(std::pow(2.0, -L / 2.0)), one_of_unit(std::pow(2.0, -L)), size(factor), decay(rule.decay);
  const Vec beta1(rule.beta1), rest1(rule.rest1), beta2(rule.beta2), rest2(rule.rest2), eps(rule.eps), gain(rule.gain);
  Lanes lanes{};
  for (int64_t g = 0; g < groups; ++g, x += U * V, w += U * V, m += V, v += V) {
    const Sums sums = unit_sums<L, ENERGY>(x);
    const Vec a = sums.x * gain_of_mean;
    Vec exp_avg = Vec::loadu(m), exp_avg_sq = Vec::loadu(v);
    if constexpr (PHASE & MOMENTS) {
      // A product with a power of two has the bits of the quotient.
      const Vec e = !ENERGY ? a * a : COUNTED ? sums.squares / count : sums.squares * one_of_unit;
      exp_avg = exp_avg * beta1 + a * rest1;
      exp_avg_sq = exp_avg_sq * beta2 + e * rest2;
      exp_avg.store(m);
      exp_avg_sq.store(v);
    }
    const Vec d = exp_avg_sq.sqrt() + eps;
    if constexpr (PHASE == MOMENTS) {
      if (norm) {
        float values[V];
        (exp_avg / d).store(values);
        for (int i = 0; i < V; ++i) lanes[i] += static_cast<double>(values[i]) * static_cast<double>(values[i]);
      }
    }
    if constexpr (PHASE & WRITE) {
      const Vec size_of_unit = size / d, mean = a * gain_of_mean;
      const Vec lift = exp_avg * gain_of_mean * size_of_unit, detail_size = size_of_unit * gain;
#pragma GCC unroll 4
      for (int j = 0; j < U; ++j) {
        const Vec detail = (load(x + j * V) - spread<L>(mean, j)) * spread<L>(detail_size, j);
        Vec weight = load(w + j * V) - (detail + spread<L>(lift, j));
        if (rule.decay != 0) weight = weight - weight * decay;
        store(w + j * V, weight);
      }
    }
  }
  if (norm) {
    for (int i = 0; i < V; ++i) (*norm)[i] += lanes[i];
  }
}

// Up to V units in a padded copy. Elements of the copy lie at `x`; those at lead..lead+held of it have a weight at `w`.
template <int L, int64_t PHASE, bool ENERGY, typename W, typename G>
void run_padded(const Rule& rule, const G* x, int64_t elements, W* w, int64_t lead, int64_t held, float* m, float* v,
                int64_t units, int64_t last, float factor, Lanes* norm) {
  constexpr int64_t U = 1 << L;
  std::array<G, U * V> xs{};
  std::array<W, U * V> ws{};
  std::array<float, V> ms{}, vs{}, counts;
  counts.fill(U);
  counts[units - 1] = last;
  std::copy_n(x, elements, xs.begin());
  std::copy_n(m, units, ms.begin());
  std::copy_n(v, units, vs.begin());
  if constexpr (PHASE & WRITE) std::copy_n(w, held, ws.begin() + lead);
  run<L, PHASE, ENERGY, true>(rule, xs.data(), ws.data(), ms.data(), vs.data(), 1, Vec::loadu(counts.data()), factor, norm);
  if constexpr (PHASE & WRITE) std::copy_n(ws.begin() + lead, held, w);
  if constexpr (PHASE & MOMENTS) {
    std::copy_n(ms.begin(), units, m);
    std::copy_n(vs.begin(), units, v);
  }
}

template <int L, int64_t PHASE, bool ENERGY, typename W, typename G>
void run_item(const Item& item, const Parameter& p, const float* exchange, float factor, Lanes* norm) {
  constexpr int64_t U = 1 << L;
  W* w = static_cast<W*>(p.weight) + item.element;
  float *m = p.exp_avg + item.moment, *v = p.exp_avg_sq + item.moment;
  if (item.slot >= 0) {
    Lanes* owned = item.lead == 0 ? norm : nullptr;
    run_padded<L, PHASE, ENERGY>(p.rule, exchange + item.slot, item.last, w, item.lead, item.held, m, v, 1, item.last,
                                 factor, owned);
    return;
  }
  const G* x = static_cast<const G*>(p.gradient) + item.element;
  const int64_t whole = item.last == U ? item.units : item.units - 1, groups = whole / V, units = item.units - groups * V;
  const Vec count(U);
  for (int64_t row = 0; row < item.rows; ++row) {
    run<L, PHASE, ENERGY, false>(p.rule, x, w, m, v, groups, count, factor, norm);
    if (units) {
      const int64_t done = groups * V * U, elements = (units - 1) * U + item.last;
      run_padded<L, PHASE, ENERGY>(p.rule, x + done, elements, w + done, 0, elements, m + groups * V, v + groups * V,
                                   units, item.last, factor, norm);
    }
    x += item.element_stride, w += item.element_stride, m += item.moment_stride, v += item.moment_stride;
  }
}

template <int L, int64_t PHASE, typename W, typename G>
void run_typed(const Item& item, const Parameter& p, const float* exchange, float factor, Lanes* norm) {
  if ((PHASE & MOMENTS) && p.rule.energy) {
    run_item<L, PHASE, true, W, G>(item, p, exchange, factor, norm);
  } else {
    run_item<L, PHASE, false, W, G>(item, p, exchange, factor, norm);
  }
}

template <int L, int64_t PHASE>
void run_level(const Item& item, const Parameter& p, const float* exchange, float factor, Lanes* norm) {
  if (item.level != L) {
    if constexpr (L < MAX_LEVEL) run_level<L + 1, PHASE>(item, p, exchange, factor, norm);
  } else if (PHASE == MOMENTS || !p.weight_bf16) {  // the moments do not depend on the dtype of the weight
    p.gradient_bf16 ? run_typed<L, PHASE, float, BFloat16>(item, p, exchange, factor, norm)
                    : run_typed<L, PHASE, float, float>(item, p, exchange, factor, norm);
  } else if constexpr (PHASE != MOMENTS) {
    p.gradient_bf16 ? run_typed<L, PHASE, BFloat16, BFloat16>(item, p, exchange, factor, norm)
                    : run_typed<L, PHASE, BFloat16, float>(item, p, exchange, factor, norm);
  }
}

template <int64_t PHASE>
void run_phase(const Item* items, int64_t n, const std::vector<Parameter>& parameters, const float* exchange,
               double* norms, const double* rho) {
  std::vector<double> sums(PHASE == MOMENTS ? n : 0);
  std::atomic<int64_t> next{0};
  // Threads take items as they come: which thread takes which changes nothing in the result.
  at::parallel_for(0, std::min<int64_t>(n, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < n; i = next++) {
      const Item& item = items[i];
      const Parameter& p = parameters[item.parameter];
      double factor = p.rule.size;
      if (item.level > 0) factor *= p.rule.scale;
      if (PHASE == WRITE && item.norm >= 0) factor /= rho[item.norm];
      Lanes norm{};
      run_level<0, PHASE>(item, p, exchange, static_cast<float>(factor), item.norm >= 0 ? &norm : nullptr);
      if (PHASE == MOMENTS) sums[i] = std::accumulate(norm.begin(), norm.end(), 0.0);
    }
  });
  if (PHASE == MOMENTS) {
    for (int64_t i = 0; i < n; ++i) {
      if (items[i].norm >= 0) norms[items[i].norm] += sums[i];
    }
  }
}

void* data(const at::Tensor& t, bool bf16_too) {
  TORCH_CHECK(t.is_cpu() && t.is_contiguous(), "gwt_dist: a CPU kernel was given a tensor of another device or not dense");
  TORCH_CHECK(t.scalar_type() == at::kFloat || (bf16_too && t.scalar_type() == at::kBFloat16),
              "gwt_dist: a CPU kernel was given a tensor of dtype ", t.scalar_type());
  return t.data_ptr();
}

// rules [n, 8] fp64: lr, beta1, beta2, eps, weight_decay, scale, detail_gain, energy.
Rule rule_of(const double* r, double t) {
  const double lr = r[0], beta1 = r[1], beta2 = r[2];
  Rule rule;
  rule.beta1 = beta1, rule.rest1 = 1 - beta1, rule.beta2 = beta2, rule.rest2 = 1 - beta2;
  rule.eps = r[3], rule.decay = lr * r[4], rule.gain = r[6], rule.energy = r[7] != 0;
  rule.size = std::sqrt(1 - std::pow(beta2, t)) / (1 - std::pow(beta1, t)) * lr;
  rule.scale = r[5];
  return rule;
}

void step(int64_t phase, const at::Tensor& items, const std::vector<at::Tensor>& weights,
          const std::vector<at::Tensor>& gradients, const std::vector<at::Tensor>& exp_avg,
          const std::vector<at::Tensor>& exp_avg_sq, const std::vector<at::Tensor>& steps, const at::Tensor& rules,
          const std::vector<int64_t>& rule_numbers, const at::Tensor& exchange, const at::Tensor& norms,
          const at::Tensor& rho) {
  std::vector<Parameter> parameters(weights.size());
  Rule rule;
  double t = -1;
  int64_t number = -1;
  for (size_t i = 0; i < weights.size(); ++i) {
    Parameter& p = parameters[i];
    p.weight = data(weights[i], true), p.gradient = data(gradients[i], true);
    p.exp_avg = static_cast<float*>(data(exp_avg[i], false)), p.exp_avg_sq = static_cast<float*>(data(exp_avg_sq[i], false));
    p.weight_bf16 = weights[i].scalar_type() == at::kBFloat16, p.gradient_bf16 = gradients[i].scalar_type() == at::kBFloat16;
    const double now = *steps[i].const_data_ptr<float>();
    if (now != t || rule_numbers[i] != number) {
      t = now, number = rule_numbers[i];
      rule = rule_of(rules.const_data_ptr<double>() + 8 * number, t);
    }
    p.rule = rule;
  }
  const Item* table = reinterpret_cast<const Item*>(items.const_data_ptr<int64_t>());
  const float* completed = exchange.const_data_ptr<float>();
  double* sums = norms.data_ptr<double>();
  const double* limits = rho.const_data_ptr<double>();
  TORCH_CHECK(items.size(1) == FIELDS, "gwt_dist: items have ", items.size(1), " fields, the kernel was built for ", FIELDS);
  py::gil_scoped_release without_gil;
  if (phase == MOMENTS) run_phase<MOMENTS>(table, items.size(0), parameters, completed, sums, limits);
  if (phase == WRITE) run_phase<WRITE>(table, items.size(0), parameters, completed, sums, limits);
  if (phase == STEP) run_phase<STEP>(table, items.size(0), parameters, completed, sums, limits);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("step", &step);
  m.attr("lanes") = V;
}
