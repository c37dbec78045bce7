// What kernels on a CPU are given, and what they ask of it before they read: items of a table, tensors, rules.

#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>  // a third of the time to compile of torch/extension.h

#include <deque>
#include <tuple>
#include <vector>

#include "formats.h"
#include "rule.h"

namespace {

struct Item {
  int64_t GWT_ITEM;  // the names of its fields, in order
};
constexpr int64_t FIELDS = sizeof(Item) / sizeof(int64_t);

at::ScalarType type_of(int64_t format) {
  TORCH_CHECK(format >= 0 && format < FORMATS, "gwt_dist: the kernel was built for ", +FORMATS,
              " formats and given number ", format);
  return format == int8 ? at::kChar : format == e4m4 ? at::kByte : format == bf16 ? at::kBFloat16 : at::kFloat;
}

void* data(const at::Tensor& t, at::ScalarType type) {
  TORCH_CHECK(t.is_cpu() && t.is_contiguous(), "gwt_dist: a CPU kernel was given a tensor of another device or not dense");
  TORCH_CHECK(t.scalar_type() == type, "gwt_dist: a CPU kernel was given a tensor of dtype ", t.scalar_type(),
              " in place of ", type);
  return t.data_ptr();
}

float* floats(const at::Tensor& t) { return static_cast<float*>(data(t, at::kFloat)); }

// Of weights, gradients and what travels, which may be in bf16 as well.
bool is_bf16(const at::Tensor& t) { return t.scalar_type() == at::kBFloat16; }
void* elements(const at::Tensor& t) { return data(t, is_bf16(t) ? at::kBFloat16 : at::kFloat); }

// The format of a moment, what is stored of each parameter, and the scales of each: none in a format without.
using Moments = std::tuple<int64_t, std::vector<at::Tensor>, std::vector<at::Tensor>>;

Moment moment_of(const Moments& all, size_t parameter) {
  const auto& [format, codes, scales] = all;
  const bool scaled = format == int8 || format == e4m4;
  return {static_cast<Format>(format), data(codes.at(parameter), type_of(format)),
          scaled ? floats(scales.at(parameter)) : nullptr};
}

// Of the units of a row of an item: the moment, and the noise that rounds it.
Moment moment_of(const Moment& all, const Item& item, int64_t row) {
  const int64_t cells = (item.moment_stride + CELL - 1) / CELL;
  return all.at(item.moment + row * item.moment_stride, item.scale + row * cells);
}

Noise noise_of(const Item& item, int64_t row, uint32_t key) {
  const int64_t coefficients = (item.columns + (1 << item.level) - 1) >> item.level;
  return Noise(key, item.row + row, item.column >> item.level, coefficients);
}

bool readable(const at::Tensor& t, int64_t numel, at::ScalarType type) {
  return t.defined() && !t.unsafeGetTensorImpl()->is_python_dispatch() && t.layout() == at::kStrided && t.is_cpu() &&
         t.numel() == numel && t.scalar_type() == type && t.is_contiguous();
}

bool readable_elements(const at::Tensor& t, int64_t numel) {
  return readable(t, numel, at::kFloat) || readable(t, numel, at::kBFloat16);
}

// Whether `step` may read and write all of these: of each field of state, in its format, as many numbers as `needed` says,
// and of a gradient as many as of its weight.
bool fits(const at::Tensor& needed, const std::vector<at::Tensor>& weights, const std::vector<at::Tensor>& gradients,
          const std::vector<at::Tensor>& steps, const std::vector<std::vector<at::Tensor>>& state,
          const std::vector<int64_t>& formats) {
  const int64_t* numels = needed.const_data_ptr<int64_t>();
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!readable_elements(weights[i], weights[i].numel()) || !readable_elements(gradients[i], weights[i].numel()) ||
        !readable(steps[i], 1, at::kFloat)) {
      return false;
    }
    for (size_t field = 0; field < state.size(); ++field) {
      if (!readable(state[field][i], *numels++, type_of(formats.at(field)))) return false;
    }
  }
  return true;
}

void count(const std::vector<at::Tensor>& steps) {
  for (const at::Tensor& step : steps) *floats(step) += 1;
}

// What `make` makes of a rule and a step, once for parameters in a row that have both in common; these point to it.
template <typename T>
class Known {
 public:
  template <typename Make>
  const T* of(const at::Tensor& step, const std::vector<Numbers>& rules, int64_t rule, const Make& make) {
    const double now = *step.const_data_ptr<float>();
    if (now != t_ || rule != rule_) {
      t_ = now, rule_ = rule;
      all_.push_back(make(rules.at(rule), now));
    }
    return &all_.back();
  }

 private:
  std::deque<T> all_;
  double t_ = -1;
  int64_t rule_ = -1;
};

}  // namespace
