// The one list of rules in C++. Schemas, kernel tables and the Python registry's test are made from it.
#pragma once

#include <type_traits>

#include "rules/adabelief.h"
#include "rules/adadelta.h"
#include "rules/adagrad.h"
#include "rules/adam.h"
#include "rules/adamax.h"
#include "rules/adamw.h"
#include "rules/adan.h"
#include "rules/ademamix.h"
#include "rules/asgd.h"
#include "rules/cautious.h"
#include "rules/lamb.h"
#include "rules/lars.h"
#include "rules/lion.h"
#include "rules/nadam.h"
#include "rules/novograd.h"
#include "rules/radam.h"
#include "rules/rmsprop.h"
#include "rules/rprop.h"
#include "rules/schedulefree.h"
#include "rules/sgd.h"
#include "rules/stableadamw.h"

namespace pytrain::PT_ISA::rules {

template <class... Rules>
struct List {
  static constexpr int size = sizeof...(Rules);
};

using All = List<SGD, SGDMomentum, SGDNesterov, Adam, AdamAmsgrad, AdamW, AdamWAmsgrad, Adamax, NAdam, RAdam, Adagrad,
                 Adadelta, RMSprop, RMSpropMomentum, RMSpropCentered, RMSpropCenteredMomentum, ASGD, Rprop, Lion, Lamb,
                 Lars, NovoGrad, Adan, AdEMAMix, StableAdamW, ScheduleFreeAdamW, CautiousAdamW, CautiousLion,
                 AdaBelief>;

// How many state tensors a rule has, from its list of names.
template <class Rule>
constexpr int state_count() {
  if constexpr (std::is_array_v<decltype(Rule::states)>) {
    return sizeof(Rule::states) / sizeof(Rule::states[0]);
  } else {
    return 0;
  }
}

template <class Rule, class = void>
struct Scalars {
  static constexpr int count = 0;
  static constexpr const char* const* names = nullptr;
};
template <class Rule>
struct Scalars<Rule, std::void_t<decltype(Rule::scalars)>> {
  static constexpr int count = sizeof(Rule::scalars) / sizeof(Rule::scalars[0]);
  static constexpr const char* const* names = Rule::scalars;
};

// How many numbers of a whole tensor it keeps between steps, and how many sums over one it takes.
template <class Rule>
constexpr int scalar_count() {
  return Scalars<Rule>::count;
}

template <class Rule, class = void>
struct Sums {
  static constexpr int count = 0;
};
template <class Rule>
struct Sums<Rule, std::void_t<decltype(Rule::sums)>> {
  static constexpr int count = Rule::sums;
};
template <class Rule>
constexpr int sum_count() {
  return Sums<Rule>::count;
}

template <class Rule>
constexpr int hyper_count() {
  return sizeof(Rule::hypers) / sizeof(Rule::hypers[0]);
}

}  // namespace pytrain::PT_ISA::rules
