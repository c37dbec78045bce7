// Both phases of a step on a CPU, for Haar units of 2**L elements, L = 0..8: fp32 mathematics on fp32 or bf16 buffers.
//
// Vec (`vectors.h`) holds V floats. A group is V neighbouring units, U * V elements; every unit is handled as a lane of a
// group, the last ones of a row and cut units in a padded copy. Only single additions, multiplications, divisions and
// square roots are used, in the order of `update.py` (built with -ffp-contract=off), so a unit has the bits of the
// reference wherever it lies and however many threads there are.
//
// What an item of the table means is written down in `work.py`.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>  // a third of the time to compile of torch/extension.h

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <numeric>
#include <vector>

#include "vectors.h"

namespace {

constexpr int MAX_LEVEL = 8;

enum Phase : int64_t { MOMENTS = 1, WRITE = 2, STEP = 3 };

struct Item {
  int64_t parameter, level, element, moment, rows, units, last, element_stride, moment_stride, slot, lead, held, norm;
};
constexpr int64_t FIELDS = sizeof(Item) / sizeof(int64_t);

struct Rule {
  float beta1, rest1, beta2, rest2, eps, gain, decay_factor;  // of weight decay: 1 - lr * weight_decay
  float steady, most;                                         // factor and limit of the coherence
  double size, scale, limiter;
  bool energy, coherent;
};

// Items first..last of the table, and their norms; none (-1) without a limiter.
struct Batch {
  int64_t first, last, first_norm, last_norm;
};
constexpr int64_t BATCH_FIELDS = sizeof(Batch) / sizeof(int64_t);

struct Parameter {
  void *weight, *gradient;
  float *exp_avg, *exp_avg_sq;
  bool weight_bf16, gradient_bf16;
  Rule rule;
};

// Squares are added in double, lane by lane; the order depends on nothing but the item.
using Lanes = std::array<double, V>;

// Groups between reading gradients and writing weights: enough for the latencies of one unit's root and division to hide
// behind other units, few enough for the gradients to stay in the L1 cache.
template <int L>
constexpr int BLOCK = std::clamp(256 / (V << L), 1, 32);

// Fetches a group that lies `ahead` elements further on, past the end or not: the processor's own prefetching stops at
// the end of a page, and does not know that weights follow gradients.
template <int L, int ahead, typename T>
INLINE void prefetch(const T* p) {
  for (size_t i = 0; i < V << L; i += 64 / sizeof(T)) __builtin_prefetch(p + ahead + i);
}

// What the elements of V units have in common: weight = (weight - (gradient * details + others)) * decay_factor.
struct Units {
  std::array<float, V> details, others;
};

// Weights of V units: x, w [V * 2**L].
template <int L, typename W, typename G>
INLINE void write(const Units& units, const Vec& decay_factor, const G* x, W* w) {
  const Vec details = Vec::loadu(units.details.data()), others = Vec::loadu(units.others.data());
  if constexpr (L > 0 && std::is_same_v<W, BFloat16>) {
#pragma GCC unroll 4
    for (int j = 0; j < (1 << L) / 2; ++j, x += 2 * V, w += 2 * V) {  // both elements of a pair belong to one unit
      const Vec factor = spread<L - 1>(details, j), term = spread<L - 1>(others, j);
      const Pairs gradient = load_pairs(x), weight = load_pairs(w);
      store_pairs(w, {(weight.even - (gradient.even * factor + term)) * decay_factor,
                      (weight.odd - (gradient.odd * factor + term)) * decay_factor});
    }
  } else {
#pragma GCC unroll 8
    for (int j = 0; j < (1 << L); ++j, x += V, w += V) {
      const Vec factor = spread<L>(details, j), term = spread<L>(others, j);
      store(w, (load(w) - (load(x) * factor + term)) * decay_factor);
    }
  }
}

// `groups` groups of V units each: x, w [groups * V * 2**L], m, v [groups * V]. `counts` holds the number of real elements
// of each unit of a single group; without it all have 2**L.
template <int L, int64_t PHASE, bool ENERGY, typename W, typename G>
void run(const Rule& rule, const G* x, W* w, float* m, float* v, int64_t groups, const float* counts, float factor,
         Lanes* norm) {
  constexpr int64_t U = 1 << L;
  const Vec gain_of_mean(std::pow(2.0, -L / 2.0)), one_of_unit(std::pow(2.0, -L)), one(1.f);
  const Vec size(factor), decay_factor(rule.decay_factor);
  const Vec beta1(rule.beta1), rest1(rule.rest1), beta2(rule.beta2), rest2(rule.rest2), eps(rule.eps);
  const Vec least(L ? rule.gain : 0.f), steady(rule.steady), most(rule.most);
  const bool coherent = L && rule.coherent;
  Lanes lanes{};
  std::array<Units, PHASE & WRITE ? BLOCK<L> : 1> block;
  for (int64_t first = 0; first < groups; first += BLOCK<L>) {
    const int64_t n = std::min<int64_t>(BLOCK<L>, groups - first);
    for (int64_t g = 0; g < n; ++g, m += V, v += V) {
      // Gradients in bf16 come early enough by themselves, and a step in bf16 has no instruction to spare.
      if constexpr (std::is_same_v<G, float>) prefetch<L, 1024>(x + g * U * V);
      if constexpr (PHASE & WRITE) prefetch<L, 512>(w + g * U * V);
      const Sums sums = unit_sums<L, ENERGY>(x + g * U * V);
      const Vec a = sums.x * gain_of_mean;
      Vec exp_avg = Vec::loadu(m), exp_avg_sq = Vec::loadu(v);
      if constexpr (PHASE & MOMENTS) {
        // A product with a power of two has the bits of the quotient.
        const Vec e = !ENERGY ? a * a : counts ? sums.squares / Vec::loadu(counts) : sums.squares * one_of_unit;
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
        const Vec inverse = one / d, size_of_unit = inverse * size;
        Vec gain = least;
        if (coherent) {  // `update.coherence`
          const Vec before = (exp_avg - a * rest1) * inverse;
          gain = at::vec::clamp_min(at::vec::clamp_max(before * before * steady, most), least);
        }
        const Vec details = size_of_unit * gain;
        details.store(block[g].details.data());
        (exp_avg * gain_of_mean * size_of_unit - a * gain_of_mean * details).store(block[g].others.data());
      }
    }
    if constexpr (PHASE & WRITE) {
      for (int64_t g = 0; g < n; ++g) {
        write<L>(block[g], decay_factor, x + g * U * V, w + g * U * V);
      }
    }
    x += BLOCK<L> * U * V, w += BLOCK<L> * U * V;
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
  run<L, PHASE, ENERGY>(rule, xs.data(), ws.data(), ms.data(), vs.data(), 1, counts.data(), factor, norm);
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
  for (int64_t row = 0; row < item.rows; ++row) {
    run<L, PHASE, ENERGY>(p.rule, x, w, m, v, groups, nullptr, factor, norm);
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
    for (int64_t taken = next++; taken < n; taken = next++) {
      // The write goes backwards: what the moments read last is what caches still hold.
      const int64_t i = PHASE == WRITE ? n - 1 - taken : taken;
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

// As `update.limit_growth`: the divisor for a tensor whose squared norm is given, and the norm to remember.
double limit_growth(double squared_norm, double limiter, float* limited_norm) {
  const double norm = std::sqrt(squared_norm), before = *limited_norm;
  if (!std::isfinite(norm) || norm <= 0) return 1;
  const double rho = before > 0 ? std::max(norm / (before + 1e-8), limiter) / limiter : 1;
  *limited_norm = static_cast<float>(norm / rho);
  return rho;
}

// One norm of a tensor: what it remembers, and the limiter of its parameter.
struct Norm {
  float* limited;
  double limiter;
};

// One batch after the other, each through both phases, with the limiters of its tensors between them.
void run_batches(const Item* items, const Batch* batches, int64_t n, const std::vector<Parameter>& parameters,
                 const float* exchange, const std::vector<Norm>& norms) {
  std::vector<double> sums(norms.size()), rho(norms.size());
  for (const Batch* batch = batches; batch < batches + n; ++batch) {
    const Item* its = items + batch->first;
    const int64_t count = batch->last - batch->first;
    if (batch->first_norm < 0) {
      run_phase<STEP>(its, count, parameters, exchange, nullptr, nullptr);
      continue;
    }
    run_phase<MOMENTS>(its, count, parameters, exchange, sums.data(), nullptr);
    for (int64_t i = batch->first_norm; i < batch->last_norm; ++i) {
      rho[i] = limit_growth(sums[i], norms[i].limiter, norms[i].limited);
    }
    run_phase<WRITE>(its, count, parameters, exchange, nullptr, rho.data());
  }
}

void* data(const at::Tensor& t, bool bf16_too) {
  TORCH_CHECK(t.is_cpu() && t.is_contiguous(), "gwt_dist: a CPU kernel was given a tensor of another device or not dense");
  TORCH_CHECK(t.scalar_type() == at::kFloat || (bf16_too && t.scalar_type() == at::kBFloat16),
              "gwt_dist: a CPU kernel was given a tensor of dtype ", t.scalar_type());
  return t.data_ptr();
}

// lr, beta1, beta2, eps, weight_decay, scale, detail_gain, energy, limiter, coherent.
using Numbers = std::array<double, 10>;

Rule rule_of(const Numbers& r, double t) {
  const double lr = r[0], beta1 = r[1], beta2 = r[2];
  Rule rule;
  rule.beta1 = beta1, rule.rest1 = 1 - beta1, rule.beta2 = beta2, rule.rest2 = 1 - beta2;
  rule.eps = r[3], rule.decay_factor = 1 - lr * r[4], rule.gain = r[6], rule.energy = r[7] != 0;
  const double whole1 = 1 - std::pow(beta1, t), whole2 = 1 - std::pow(beta2, t), before = whole1 - (1 - beta1);
  rule.size = std::sqrt(whole2) / whole1 * lr;
  rule.coherent = r[9] != 0, rule.most = whole1;
  rule.steady = t > 1 && before > 0 ? whole1 * whole2 / (before * before) : 0;
  rule.scale = r[5], rule.limiter = r[8];
  return rule;
}

void step(int64_t phase, const at::Tensor& items, const at::Tensor& batches, const std::vector<at::Tensor>& weights,
          const std::vector<at::Tensor>& gradients, const std::vector<at::Tensor>& exp_avg,
          const std::vector<at::Tensor>& exp_avg_sq, const std::vector<at::Tensor>& steps,
          const std::vector<Numbers>& rules, const std::vector<int64_t>& rule_numbers, const at::Tensor& exchange,
          const at::Tensor& squared_norms, const at::Tensor& rho, const std::vector<at::Tensor>& limited_norms) {
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
      rule = rule_of(rules.at(number), t);
    }
    p.rule = rule;
  }
  std::vector<Norm> norms;
  for (size_t i = 0; i < limited_norms.size(); ++i) {
    float* limited = static_cast<float*>(data(limited_norms[i], false));
    for (int64_t place = 0; place < limited_norms[i].numel(); ++place) {
      norms.push_back({limited + place, parameters.at(i).rule.limiter});
    }
  }
  TORCH_CHECK(items.size(1) == FIELDS && batches.size(1) == BATCH_FIELDS, "gwt_dist: items have ", items.size(1),
              " fields and batches ", batches.size(1), ", the kernel was built for ", FIELDS, " and ", BATCH_FIELDS);
  const Item* table = reinterpret_cast<const Item*>(items.const_data_ptr<int64_t>());
  const Batch* in_batches = reinterpret_cast<const Batch*>(batches.const_data_ptr<int64_t>());
  const float* completed = exchange.const_data_ptr<float>();
  double* sums = squared_norms.data_ptr<double>();
  const double* limits = rho.const_data_ptr<double>();
  py::gil_scoped_release without_gil;
  if (phase == MOMENTS) run_phase<MOMENTS>(table, items.size(0), parameters, completed, sums, limits);
  if (phase == WRITE) run_phase<WRITE>(table, items.size(0), parameters, completed, sums, limits);
  if (phase == STEP) run_batches(table, in_batches, batches.size(0), parameters, completed, norms);
}

void count(const std::vector<at::Tensor>& steps) {
  for (const at::Tensor& step : steps) *static_cast<float*>(data(step, false)) += 1;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("step", &step);
  m.def("count", &count);
  m.attr("lanes") = V;
}
