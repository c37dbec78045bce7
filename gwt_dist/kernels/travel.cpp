// A step of matrices that travel, on a CPU, for Haar units of 2**L elements, L = 1..8, but for the work on whole matrices.
//
// Many items, taken by threads; what is done with one is in `travel.h`. One library is built for each formula and write of
// a program, and `cpu.py` says which. What an item of the table means is written down in `work.py`.

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "tensors.h"
#include "travel.h"

namespace {

// A rule at one step.
struct Step {
  Formula formula;
  double lr;
  float decay_factor;

  explicit Step(const Rule& rule) : formula(rule), lr(rule[number::lr]), decay_factor(rule.decay_factor()) {}
};

struct Parameter {
  void *weight, *gradient;
  float* exp_avg;
  bool weight_bf16, gradient_bf16;
  const Step* step;
};

// What all items of a call have in common.
struct Call {
  const std::vector<Parameter>& parameters;
  const float* exchange;
  double* sums;   // two numbers a tensor
  void* landing;  // where U goes, or O came back
};

// Elements of an item, which lie side by side: rows that are taken together are whole.
int64_t elements_of(const Item& item) {
  return item.slot >= 0 ? item.held : item.rows * (((item.units - 1) << item.level) + item.last);
}

template <int L, int64_t PHASE, typename G, typename U>
void run_units(const Call& call, const Item& item, Squares& squares) {
  const Parameter& p = call.parameters[item.parameter];
  const Formula& formula = p.step->formula;
  const double gain = PHASE == SEND ? formula.detail_gain(call.sums[item.norm], call.sums[item.norm + 1]) : 0;
  float* m = p.exp_avg + item.moment;
  U* u = static_cast<U*>(call.landing) + (PHASE == SEND ? item.landing : 0);
  if (item.slot >= 0) {
    run_padded<L, PHASE>(formula, gain, call.exchange + item.slot, item.last, m, u, item.lead, item.held, 1, squares);
    return;
  }
  const G* x = static_cast<const G*>(p.gradient) + item.element;
  const int64_t whole = item.last == 1 << L ? item.units : item.units - 1, groups = whole / V, units = item.units - groups * V;
  for (int64_t row = 0; row < item.rows; ++row) {
    if constexpr (PHASE == NORMS) {
      add_norms<L>(x, m, groups, squares);
    } else {
      send<L>(formula, gain, x, m, u, groups);
    }
    if (units) {
      const int64_t done = groups * V << L, elements = ((units - 1) << L) + item.last;
      run_padded<L, PHASE>(formula, gain, x + done, elements, m + groups * V, u + done, 0, elements, units, squares);
    }
    x += item.element_stride, m += item.moment_stride, u += item.element_stride;
  }
}

template <int L, int64_t PHASE, typename U>
void run_level(const Call& call, const Item& item, Squares& squares) {
  if (item.level != L) {
    if constexpr (L < MAX_LEVEL) run_level<L + 1, PHASE, U>(call, item, squares);
  } else if (call.parameters[item.parameter].gradient_bf16) {
    run_units<L, PHASE, BFloat16, U>(call, item, squares);
  } else {
    run_units<L, PHASE, float, U>(call, item, squares);
  }
}

template <typename W, typename U>
void run_elements(const Call& call, const Item& item) {
  const Parameter& p = call.parameters[item.parameter];
  const float size = p.step->formula.lost(p.step->lr, item.side);
  keep(size, p.step->decay_factor, static_cast<W*>(p.weight) + item.element,
       static_cast<const U*>(call.landing) + item.landing, elements_of(item));
}

// U is the dtype of the landing buffer.
template <int64_t PHASE, typename U>
void run_phase(const Call& call, const Item* items, int64_t n) {
  std::vector<std::array<double, 2>> found(PHASE == NORMS ? n : 0);
  std::atomic<int64_t> next{0};
  // Threads take items as they come: which thread takes which changes nothing in the result.
  at::parallel_for(0, std::min<int64_t>(n, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < n; i = next++) {
      if constexpr (PHASE == KEEP) {
        call.parameters[items[i].parameter].weight_bf16 ? run_elements<BFloat16, U>(call, items[i])
                                                        : run_elements<float, U>(call, items[i]);
      } else {
        Squares squares{};
        run_level<1, PHASE, U>(call, items[i], squares);
        for (int which = 0; PHASE == NORMS && which < 2; ++which) {
          found[i][which] = std::accumulate(squares[which].begin(), squares[which].end(), 0.0);
        }
      }
    }
  });
  for (int64_t i = 0; PHASE == NORMS && i < n; ++i) {
    for (int which = 0; which < 2; ++which) call.sums[items[i].norm + which] += found[i][which];
  }
}

// Raises for a table that says to read or write past an end.
void check(const Item* items, int64_t n, int64_t phase, int64_t parameters, int64_t sums, int64_t elements) {
  for (const Item* item = items; item < items + n; ++item) {
    TORCH_CHECK(item->level >= 1 && item->level <= MAX_LEVEL, "gwt_dist: a matrix of level ", item->level,
                " travels; the C++ kernels take levels 1 to ", MAX_LEVEL);
    TORCH_CHECK(item->parameter < parameters && (phase == KEEP || (item->norm >= 0 && item->norm + 2 <= sums)),
                "gwt_dist: a part of parameter ", item->parameter, " of ", parameters, " has its sums at ", item->norm,
                " of ", sums);
    TORCH_CHECK(phase == NORMS || (item->landing >= 0 && item->landing + elements_of(*item) <= elements),
                "gwt_dist: a part has ", elements_of(*item), " elements at ", item->landing, " of the ", elements,
                " that travel");
  }
}

void run(int64_t phase, const at::Tensor& items, const std::vector<at::Tensor>& weights,
         const std::vector<at::Tensor>& gradients, const std::vector<at::Tensor>& exp_avg,
         const std::vector<at::Tensor>& steps, const std::vector<Numbers>& rules, const std::vector<int64_t>& rule_numbers,
         const at::Tensor& exchange, const at::Tensor& sums, const at::Tensor& landing) {
  std::vector<Parameter> parameters(weights.size());
  Known<Step> known;
  for (size_t i = 0; i < weights.size(); ++i) {
    Parameter& p = parameters[i];
    p.weight = data(weights[i], true), p.gradient = data(gradients[i], true);
    p.exp_avg = static_cast<float*>(data(exp_avg[i], false));
    p.weight_bf16 = weights[i].scalar_type() == at::kBFloat16, p.gradient_bf16 = gradients[i].scalar_type() == at::kBFloat16;
    p.step = known.of(steps[i], rules, rule_numbers[i],
                      [](const Numbers& numbers, double t) { return Step({numbers, t, true}); });
  }
  TORCH_CHECK(items.size(1) == FIELDS, "gwt_dist: items have ", items.size(1), " fields, the kernel was built for ", FIELDS);
  const int64_t n = items.size(0);
  const Item* table = reinterpret_cast<const Item*>(items.const_data_ptr<int64_t>());
  check(table, n, phase, parameters.size(), sums.numel(), landing.numel());
  const Call call{parameters, exchange.const_data_ptr<float>(), sums.data_ptr<double>(), data(landing, true)};
  const bool bf16 = landing.scalar_type() == at::kBFloat16;
  py::gil_scoped_release without_gil;
  if (phase == NORMS) run_phase<NORMS, float>(call, table, n);
  if (phase == SEND) bf16 ? run_phase<SEND, BFloat16>(call, table, n) : run_phase<SEND, float>(call, table, n);
  if (phase == KEEP) bf16 ? run_phase<KEEP, BFloat16>(call, table, n) : run_phase<KEEP, float>(call, table, n);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("run", &run);
  m.def("count", &count);
  m.def("fits", &fits);
}
