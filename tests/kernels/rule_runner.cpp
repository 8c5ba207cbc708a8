// Every rule in fp64 behind one C function, so that a test can compare the C++ rules with the references in torch.
#include <cstring>
#include <utility>

#include "rules/all.h"

namespace rules = pytrain::PT_ISA::rules;

namespace {

template <class Rule, int... I>
void run(const double* hypers, double t, double* p, const double* g, double* const* states, int64_t n,
         std::integer_sequence<int, I...>) {
  typename Rule::Hyper hyper;
  std::memcpy(&hyper, hypers, sizeof hyper);
  const Rule rule(hyper, t);
  (void)states;
  for (int64_t i = 0; i < n; ++i) p[i] -= rule(p[i], g[i], states[I][i]...);
}

template <class... Rules>
bool find(rules::List<Rules...>, const char* name, const double* hypers, double t, double* p, const double* g,
          double* const* states, int64_t n) {
  bool found = false;
  ((std::strcmp(name, Rules::name) == 0
        ? (run<Rules>(hypers, t, p, g, states, n, std::make_integer_sequence<int, rules::state_count<Rules>()>{}),
           found = true)
        : false),
   ...);
  return found;
}

}  // namespace

extern "C" int pytrain_step(const char* rule, const double* hypers, double t, double* p, const double* g,
                            double* const* states, int64_t n) {
  return find(rules::All{}, rule, hypers, t, p, g, states, n) ? 0 : 1;
}
