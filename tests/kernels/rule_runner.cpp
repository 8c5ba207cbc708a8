// Every rule in fp64 behind one C function, so that a test can compare the C++ rules with the references in torch.
#include <cstring>
#include <utility>
#include <vector>

#include "rules/all.h"

namespace rules = pytrain::PT_ISA::rules;

namespace {

// One step of one tensor, as the kernels do it: sums where the rule wants them, then the update, then the scalars.
template <class Rule, int... I>
void run(const double* hypers, double t, double* p, const double* g, double* const* states, double* scalars, int64_t n,
         std::integer_sequence<int, I...>) {
  constexpr int n_sums = rules::sum_count<Rule>();
  typename Rule::Hyper hyper;
  std::memcpy(&hyper, hypers, sizeof hyper);
  (void)states;
  Rule rule = [&] {
    if constexpr (rules::scalar_count<Rule>() > 0) {
      return Rule(hyper, t, scalars);
    } else {
      return Rule(hyper, t);
    }
  }();
  double sums[2] = {};
  if constexpr (n_sums > 0) {
    for (int64_t i = 0; i < n; ++i) {
      double terms[n_sums], value[] = {states[I][i]..., 0.0};
      rule.measure(p[i], g[i], value[I]..., terms);
      if (Rule::measure_writes) ((states[I][i] = value[I]), ...);
      for (int k = 0; k < n_sums; ++k) sums[k] += terms[k];
    }
    rule.settle(sums, static_cast<double>(n));
  }
  for (int64_t i = 0; i < n; ++i) p[i] -= rule(p[i], g[i], states[I][i]...);
  if constexpr (rules::scalar_count<Rule>() > 0) {
    if constexpr (n_sums > 0) {
      Rule::advance(hyper, t, scalars, sums);
    } else {
      Rule::advance(hyper, t, scalars);
    }
  }
}

template <class... Rules>
bool find(rules::List<Rules...>, const char* name, const double* hypers, double t, double* p, const double* g,
          double* const* states, double* scalars, int64_t n) {
  bool found = false;
  ((std::strcmp(name, Rules::name) == 0
        ? (run<Rules>(hypers, t, p, g, states, scalars, n,
                      std::make_integer_sequence<int, rules::state_count<Rules>()>{}),
           found = true)
        : false),
   ...);
  return found;
}

}  // namespace

extern "C" int pytrain_step(const char* rule, const double* hypers, double t, double* p, const double* g,
                            double* const* states, double* scalars, int64_t n) {
  return find(rules::All{}, rule, hypers, t, p, g, states, scalars, n) ? 0 : 1;
}
