// The one list of rules in C++. Schemas, kernel tables and the Python registry's test are made from it.
#pragma once

#include <type_traits>

#include "rules/adam.h"
#include "rules/adamw.h"
#include "rules/lion.h"
#include "rules/sgd.h"

namespace pytrain::PT_ISA::rules {

template <class... Rules>
struct List {
  static constexpr int size = sizeof...(Rules);
};

using All = List<SGD, SGDMomentum, SGDNesterov, Adam, AdamAmsgrad, AdamW, AdamWAmsgrad, Lion>;

// How many state tensors a rule has, from its list of names.
template <class Rule>
constexpr int state_count() {
  if constexpr (std::is_array_v<decltype(Rule::states)>) {
    return sizeof(Rule::states) / sizeof(Rule::states[0]);
  } else {
    return 0;
  }
}

template <class Rule>
constexpr int hyper_count() {
  return sizeof(Rule::hypers) / sizeof(Rule::hypers[0]);
}

}  // namespace pytrain::PT_ISA::rules
