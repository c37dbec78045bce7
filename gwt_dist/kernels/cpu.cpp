// A step on a CPU, for Haar units of 2**L elements, L = 0..8: fp32 mathematics on fp32 or bf16 buffers.
//
// Many items, taken by threads; what is done with the units of one is in `units.h`. One library is built for each formula,
// details, write and rounding of a program, and `cpu.py` says which; it takes state in all formats of `formats.h`. What an
// item of the table means is written down in `items.py`.

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <numeric>
#include <vector>

#include "tensors.h"
#include "units.h"

namespace {

// Items first..last of the table, and their norms; none (-1) without a limiter.
struct Batch {
  int64_t first, last, first_norm, last_norm;
};
constexpr int64_t BATCH_FIELDS = sizeof(Batch) / sizeof(int64_t);

using Steps = std::array<Step, 2>;  // for units without details and with them

struct Parameter {
  void *weight, *gradient;
  Moment exp_avg, exp_avg_sq;
  bool weight_bf16, gradient_bf16;
  const Steps* steps;
};

template <int L, int64_t PHASE, typename W, typename G>
void run_item(const Item& item, const Parameter& p, const float* exchange, float size, Lanes* norm) {
  const Step& step = (*p.steps)[L > 0];
  const bool plain = p.exp_avg.format == fp32 && p.exp_avg_sq.format == fp32;
  const auto key = [&](uint32_t what) { return noise_key(step.t, what, step.seed, item.salt); };
  const auto run_row = [&](const auto& span, int64_t row) {
    const Moment m = moment_of(p.exp_avg, item, row), v = moment_of(p.exp_avg_sq, item, row);
    const Rounding rounding(Noise(key(0), item.row + row, item.column, item.columns));
    if (plain) {
      run_span<L, PHASE>(step, span, static_cast<float*>(m.codes), static_cast<float*>(v.codes), size, norm, rounding);
    } else {
      run_stored<L, PHASE>(step, span, m, v, noise_of(item, row, key(1)), size, norm, rounding);
    }
  };
  W* w = static_cast<W*>(p.weight) + item.element;
  if (item.slot >= 0) {
    if (item.lead > 0) norm = nullptr;  // another rank owns the units
    run_row(Span<L, W, float>{exchange + item.slot, w, item.units, item.last, item.lead, item.held}, 0);
    return;
  }
  const G* x = static_cast<const G*>(p.gradient) + item.element;
  for (int64_t row = 0; row < item.rows; ++row, x += item.element_stride, w += item.element_stride) {
    run_row(Span<L, W, G>{x, w, item.units, item.last, 0, (item.units - 1) * (1 << L) + item.last}, row);
  }
}

template <int L, int64_t PHASE>
void run_level(const Item& item, const Parameter& p, const float* exchange, float size, Lanes* norm) {
  if (item.level != L) {
    if constexpr (L < MAX_LEVEL) run_level<L + 1, PHASE>(item, p, exchange, size, norm);
  } else if (PHASE == MOMENTS || !p.weight_bf16) {  // the moments do not depend on the dtype of the weight
    if constexpr (PHASE == MOMENTS || Rounding::TAKES<float>) {
      p.gradient_bf16 ? run_item<L, PHASE, float, BFloat16>(item, p, exchange, size, norm)
                      : run_item<L, PHASE, float, float>(item, p, exchange, size, norm);
    }
  } else if constexpr (PHASE != MOMENTS) {
    p.gradient_bf16 ? run_item<L, PHASE, BFloat16, BFloat16>(item, p, exchange, size, norm)
                    : run_item<L, PHASE, BFloat16, float>(item, p, exchange, size, norm);
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
      const Step& step = (*p.steps)[item.level > 0];
      double size = step.detail.size * step.scale;
      if (PHASE == WRITE && item.norm >= 0) size /= rho[item.norm];
      Lanes norm{};
      run_level<0, PHASE>(item, p, exchange, static_cast<float>(size), item.norm >= 0 ? &norm : nullptr);
      if (PHASE == MOMENTS) sums[i] = std::accumulate(norm.begin(), norm.end(), 0.0);
    }
  });
  if (PHASE == MOMENTS) {
    for (int64_t i = 0; i < n; ++i) {
      if (items[i].norm >= 0) norms[items[i].norm] += sums[i];
    }
  }
}

// As `limiter.limit_growth`: the divisor for a tensor whose squared norm is given, and the norm to remember.
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

void step(int64_t phase, const at::Tensor& items, const at::Tensor& batches, const std::vector<at::Tensor>& weights,
          const std::vector<at::Tensor>& gradients, const Moments& exp_avg, const Moments& exp_avg_sq,
          const std::vector<at::Tensor>& steps, const std::vector<Numbers>& rules,
          const std::vector<int64_t>& rule_numbers, const at::Tensor& exchange, const at::Tensor& squared_norms,
          const at::Tensor& rho, const std::vector<at::Tensor>& limited_norms) {
  std::vector<Parameter> parameters(weights.size());
  Known<Steps> known;
  for (size_t i = 0; i < weights.size(); ++i) {
    Parameter& p = parameters[i];
    p.weight = elements(weights[i]), p.gradient = elements(gradients[i]);
    p.exp_avg = moment_of(exp_avg, i), p.exp_avg_sq = moment_of(exp_avg_sq, i);
    p.weight_bf16 = is_bf16(weights[i]), p.gradient_bf16 = is_bf16(gradients[i]);
    TORCH_CHECK(phase == MOMENTS || p.weight_bf16 || Rounding::TAKES<float>,
                "gwt_dist: a weight of dtype ", weights[i].scalar_type(), " is to be rounded by noise; only bf16 is");
    p.steps = known.of(steps[i], rules, rule_numbers[i], [](const Numbers& numbers, double t) {
      return Steps{Step({numbers, t, false}), Step({numbers, t, true})};
    });
  }
  std::vector<Norm> norms;
  for (size_t i = 0; i < limited_norms.size(); ++i) {
    float* limited = floats(limited_norms[i]);
    for (int64_t place = 0; place < limited_norms[i].numel(); ++place) {
      norms.push_back({limited + place, (*parameters.at(i).steps)[1].limiter});
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

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("step", &step);
  m.def("count", &count);
  m.def("fits", &fits);
  m.attr("lanes") = V;
}
