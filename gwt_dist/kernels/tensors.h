// What kernels on a CPU are given, and what they ask of it before they read: items of a table, tensors, rules.

#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>  // a third of the time to compile of torch/extension.h

#include <deque>
#include <vector>

#include "rule.h"

namespace {

struct Item {
  int64_t GWT_ITEM;  // the names of its fields, in order
};
constexpr int64_t FIELDS = sizeof(Item) / sizeof(int64_t);

void* data(const at::Tensor& t, bool bf16_too) {
  TORCH_CHECK(t.is_cpu() && t.is_contiguous(), "gwt_dist: a CPU kernel was given a tensor of another device or not dense");
  TORCH_CHECK(t.scalar_type() == at::kFloat || (bf16_too && t.scalar_type() == at::kBFloat16),
              "gwt_dist: a CPU kernel was given a tensor of dtype ", t.scalar_type());
  return t.data_ptr();
}

bool readable(const at::Tensor& t, int64_t numel, bool bf16_too) {
  return t.defined() && !t.unsafeGetTensorImpl()->is_python_dispatch() && t.layout() == at::kStrided && t.is_cpu() &&
         t.numel() == numel && (t.scalar_type() == at::kFloat || (bf16_too && t.scalar_type() == at::kBFloat16)) &&
         t.is_contiguous();
}

// Whether `step` may read and write all of these: of each field of state as many numbers as `needed` says, and of a
// gradient as many as of its weight.
bool fits(const at::Tensor& needed, const std::vector<at::Tensor>& weights, const std::vector<at::Tensor>& gradients,
          const std::vector<at::Tensor>& steps, const std::vector<std::vector<at::Tensor>>& state) {
  const int64_t* numels = needed.const_data_ptr<int64_t>();
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!readable(weights[i], weights[i].numel(), true) || !readable(gradients[i], weights[i].numel(), true) ||
        !readable(steps[i], 1, false)) {
      return false;
    }
    for (const std::vector<at::Tensor>& its : state) {
      if (!readable(its[i], *numels++, false)) return false;
    }
  }
  return true;
}

void count(const std::vector<at::Tensor>& steps) {
  for (const at::Tensor& step : steps) *static_cast<float*>(data(step, false)) += 1;
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
