// The loops of each rule on the CPU, straight through memory. Included once an instruction set, inside its target
// attribute; storage.h beside it has what is the same for all rules.
#pragma once

namespace pytrain::PT_ISA::cpu {

using pytrain::core::GroupRow;

// n elements in T = float or double. Not inlined, so that a disassembly can name it.
template <class Rule, class T, int... I>
__attribute__((noinline)) void update(const Rule& prepared, T grad_coef, T* __restrict__ p, const T* __restrict__ g,
                                      T* const* s, int64_t n, std::integer_sequence<int, I...>) {
  const Rule rule = prepared;  // a local that no store can alias: its coefficients stay in registers
  T* const states[] = {s[I]..., nullptr};
#ifdef __clang__
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
  for (int64_t i = 0; i < n; ++i) {
    // Everything is loaded before anything is stored. Large tensors start at the same offset in a page, and a store
    // holds up later loads whose addresses agree with it in the low 12 bits: 14.4 against 8.4 ms for 10 M elements.
    T value[] = {states[I][i]..., T(0)};
    const T old = p[i];
    const T next = old - rule(old, g[i] * grad_coef, value[I]...);
    p[i] = next;
    ((states[I][i] = value[I]), ...);
  }
}

// The terms that the rule sums up, for n elements.
template <class Rule, class T, int... I, int... K>
__attribute__((noinline)) void measure(const Rule& prepared, T grad_coef, const T* __restrict__ p,
                                       const T* __restrict__ g, T* const* s, T* const* terms, int64_t n,
                                       std::integer_sequence<int, I...>, std::integer_sequence<int, K...>) {
  const Rule rule = prepared;
  T* const states[] = {s[I]..., nullptr};
  T* const out[] = {terms[K]...};
#ifdef __clang__
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
  for (int64_t i = 0; i < n; ++i) {
    T value[] = {states[I][i]..., T(0)};
    T term[sizeof...(K)];
    rule.measure(p[i], g[i] * grad_coef, value[I]..., term);
    if constexpr (Rule::measure_writes) ((states[I][i] = value[I]), ...);
    ((out[K][i] = term[K]), ...);
  }
}

template <class Rule>
typename Rule::Hyper hyper(const GroupRow& row) {
  typename Rule::Hyper h;
  static_assert(sizeof h <= sizeof row.hypers && sizeof h == sizeof(double) * rules::hyper_count<Rule>());
  __builtin_memcpy(&h, row.hypers, sizeof h);
  return h;
}

constexpr int max_rule_bytes = 256;

template <class Rule>
void prepare(const GroupRow& row, double step, const double* scalars, void* memory) {
  static_assert(sizeof(Rule) <= max_rule_bytes && std::is_trivially_copyable_v<Rule>);
  (void)scalars;
  if constexpr (rules::scalar_count<Rule>() > 0) {
    new (memory) Rule(hyper<Rule>(row), step, scalars);
  } else {
    new (memory) Rule(hyper<Rule>(row), step);
  }
}

template <class Rule, class T>
void update_any(const void* rule, T coef, T* p, const T* g, T* const* states, int64_t n) {
  update<Rule, T>(*static_cast<const Rule*>(rule), coef, p, g, states, n,
                  std::make_integer_sequence<int, rules::state_count<Rule>()>{});
}

template <class Rule, class T>
void measure_any(const void* rule, T coef, T* p, const T* g, T* const* states, T* const* terms, int64_t n) {
  measure<Rule, T>(*static_cast<const Rule*>(rule), coef, p, g, states, terms, n,
                   std::make_integer_sequence<int, rules::state_count<Rule>()>{},
                   std::make_integer_sequence<int, rules::sum_count<Rule>()>{});
}

template <class Rule>
void settle(void* rule, const double* sums, double numel) {
  static_cast<Rule*>(rule)->settle(sums, numel);
}

template <class Rule>
void advance(const GroupRow& row, double step, double* scalars, const double* sums) {
  (void)sums;
  if constexpr (rules::sum_count<Rule>() > 0) {
    Rule::advance(hyper<Rule>(row), step, scalars, sums);
  } else {
    Rule::advance(hyper<Rule>(row), step, scalars);
  }
}

template <class Rule>
constexpr pytrain::cpu::RuleFunctions functions() {
  pytrain::cpu::RuleFunctions f{};
  f.prepare = &prepare<Rule>;
  f.update32 = &update_any<Rule, float>;
  f.update64 = &update_any<Rule, double>;
  f.states = rules::state_count<Rule>();
  f.sums = rules::sum_count<Rule>();
  if constexpr (rules::sum_count<Rule>() > 0) {
    f.measure32 = &measure_any<Rule, float>;
    f.measure64 = &measure_any<Rule, double>;
    f.settle = &settle<Rule>;
    f.measure_writes = Rule::measure_writes;
  }
  if constexpr (rules::scalar_count<Rule>() > 0) f.advance = &advance<Rule>;
  return f;
}

template <class... Rules>
constexpr pytrain::cpu::Kernels table(rules::List<Rules...>) {
  return {{functions<Rules>()...}, &step, &take_sums, &stats, &average_all, &copy_all,
          adafactor_functions<float>(), adafactor_functions<double>()};
}

}  // namespace pytrain::PT_ISA::cpu

namespace pytrain::PT_ISA {
extern const pytrain::cpu::Kernels kernels;
constexpr pytrain::cpu::Kernels kernels = cpu::table(rules::All{});
}  // namespace pytrain::PT_ISA
