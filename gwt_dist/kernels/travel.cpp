// A step of matrices that travel, on a CPU, for Haar units of 2**L elements, L = 0..8, but for the work on whole matrices.
//
// Many items, taken by threads; what is done with one is in `travel.h`. One library is built for each formula, write and
// rounding of a program, and `cpu.py` says which. What an item of the table means is written down in `items.py`.

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
  uint32_t t, seed;

  explicit Step(const Rule& rule)
      : formula(rule),
        lr(rule[number::lr]),
        decay_factor(rule.decay_factor()),
        t(rule.t),
        seed(rule[number::rounding_seed]) {}

  uint32_t key(uint32_t what, const Item& item) const { return noise_key(t, what, seed, item.salt); }
};

struct Parameter {
  void *weight, *gradient;
  Moment exp_avg;
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
  double gain = formula.least;
  if (PHASE == SEND && item.norm >= 0) gain = formula.detail_gain(call.sums[item.norm], call.sums[item.norm + 1]);
  const Sent all{formula, gain, &squares};
  const auto run_row = [&](const auto& span, int64_t row) {
    run_stored<L, PHASE>(all, span, moment_of(p.exp_avg, item, row), noise_of(item, row, p.step->key(1, item)));
  };
  U* u = static_cast<U*>(call.landing) + (PHASE == SEND ? item.landing : 0);
  if (item.slot >= 0) {
    if (PHASE == NORMS && item.lead > 0) return;  // another rank owns the units
    run_row(Span<L, U, float>{call.exchange + item.slot, u, item.units, item.last, item.lead, item.held}, 0);
    return;
  }
  const G* x = static_cast<const G*>(p.gradient) + item.element;
  const int64_t elements = ((item.units - 1) << L) + item.last;
  for (int64_t row = 0; row < item.rows; ++row, x += item.element_stride, u += item.element_stride) {
    run_row(Span<L, U, G>{x, u, item.units, item.last, 0, elements}, row);
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
  const int64_t rows = Rounding::PLACED ? item.rows : 1, elements = elements_of(item) / rows;
  W* w = static_cast<W*>(p.weight) + item.element;
  const U* o = static_cast<const U*>(call.landing) + item.landing;
  for (int64_t row = 0; row < rows; ++row, w += elements, o += elements) {
    const Rounding rounding(Noise(p.step->key(0, item), item.row + row, item.column + item.lead, item.columns));
    keep(size, p.step->decay_factor, w, o, elements, rounding);
  }
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
        if (call.parameters[items[i].parameter].weight_bf16) {
          run_elements<BFloat16, U>(call, items[i]);
        } else if constexpr (Rounding::TAKES<float>) {
          run_elements<float, U>(call, items[i]);
        }
      } else {
        Squares squares{};
        run_level<0, PHASE, U>(call, items[i], squares);
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
    TORCH_CHECK(item->level >= 0 && item->level <= MAX_LEVEL, "gwt_dist: a matrix of level ", item->level,
                " travels; the C++ kernels take levels 0 to ", MAX_LEVEL);
    const bool summed = item->norm >= 0 && item->norm + 2 <= sums;
    TORCH_CHECK(item->parameter < parameters && (phase == KEEP || summed || (phase == SEND && item->norm == -1)),
                "gwt_dist: a part of parameter ", item->parameter, " of ", parameters, " has its sums at ", item->norm,
                " of ", sums);
    TORCH_CHECK(phase == NORMS || (item->landing >= 0 && item->landing + elements_of(*item) <= elements),
                "gwt_dist: a part has ", elements_of(*item), " elements at ", item->landing, " of the ", elements,
                " that travel");
  }
}

void run(int64_t phase, const at::Tensor& items, const std::vector<at::Tensor>& weights,
         const std::vector<at::Tensor>& gradients, const Moments& exp_avg,
         const std::vector<at::Tensor>& steps, const std::vector<Numbers>& rules, const std::vector<int64_t>& rule_numbers,
         const at::Tensor& exchange, const at::Tensor& sums, const at::Tensor& landing) {
  std::vector<Parameter> parameters(weights.size());
  Known<Step> known;
  for (size_t i = 0; i < weights.size(); ++i) {
    Parameter& p = parameters[i];
    p.weight = elements(weights[i]), p.gradient = elements(gradients[i]);
    p.exp_avg = moment_of(exp_avg, i);
    p.weight_bf16 = is_bf16(weights[i]), p.gradient_bf16 = is_bf16(gradients[i]);
    TORCH_CHECK(phase != KEEP || p.weight_bf16 || Rounding::TAKES<float>,
                "gwt_dist: a weight of dtype ", weights[i].scalar_type(), " is to be rounded by noise; only bf16 is");
    p.step = known.of(steps[i], rules, rule_numbers[i],
                      [](const Numbers& numbers, double t) { return Step({numbers, t, true}); });
  }
  TORCH_CHECK(items.size(1) == FIELDS, "gwt_dist: items have ", items.size(1), " fields, the kernel was built for ", FIELDS);
  const int64_t n = items.size(0);
  const Item* table = reinterpret_cast<const Item*>(items.const_data_ptr<int64_t>());
  check(table, n, phase, parameters.size(), sums.numel(), landing.numel());
  const Call call{parameters, exchange.const_data_ptr<float>(), sums.data_ptr<double>(), elements(landing)};
  const bool halves = is_bf16(landing);
  py::gil_scoped_release without_gil;
  if (phase == NORMS) run_phase<NORMS, float>(call, table, n);
  if (phase == SEND) halves ? run_phase<SEND, BFloat16>(call, table, n) : run_phase<SEND, float>(call, table, n);
  if (phase == KEEP) halves ? run_phase<KEEP, BFloat16>(call, table, n) : run_phase<KEEP, float>(call, table, n);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("run", &run);
  m.def("count", &count);
  m.def("fits", &fits);
}
