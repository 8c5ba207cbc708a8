// Chunks whose parameter and states are all fp32, or all fp64: straight through memory, 16 bytes at a time.
#pragma once

#include "cuda/block.h"

namespace pytrain::cuda {

template <class T>
struct Direct {
  static constexpr int width = 16 / sizeof(T);

  template <class Rule>
  static constexpr int room = rules::state_count<Rule>() > 0 ? rules::state_count<Rule>() : 1;

  template <class Rule>
  struct Streams {
    T* p;
    T* g;
    T* ema;  // null where none moves
    T* states[room<Rule>];
    T coef, limit, weight;
    bool zero;

    PT_DEVICE explicit Streams(const Part& part)
        : p(static_cast<T*>(part.item.memory.param) + part.first),
          g(static_cast<T*>(part.item.memory.grad) + part.first),
          ema(part.ema_weight == 0.0 ? nullptr : static_cast<T*>(part.item.extra.ema) + part.first),
          coef(T(part.coef)),
          limit(T(part.job.settings.clip_value)),
          weight(T(part.ema_weight)),
          zero(part.job.storage.zero_grad) {
      for (int s = 0; s < rules::state_count<Rule>(); ++s) {
        states[s] = static_cast<T*>(part.item.memory.states[s]) + part.first;
      }
    }
    PT_DEVICE bool is_aligned() const {
      bool all = aligned<T, width>(p) && aligned<T, width>(g) && aligned<T, width>(ema);
      for (int s = 0; s < rules::state_count<Rule>(); ++s) all = all && aligned<T, width>(states[s]);
      return all;
    }
  };

  template <int N>
  using V = Vec<T, N>;

  template <int N, class Rule, int... I>
  static PT_DEVICE void update_at(const Rule& rule, const Streams<Rule>& x, int64_t i,
                                  std::integer_sequence<int, I...>) {
    V<N> p = *reinterpret_cast<const V<N>*>(x.p + i);
    const V<N> g = *reinterpret_cast<const V<N>*>(x.g + i);
    V<N> s[room<Rule>] = {*reinterpret_cast<const V<N>*>(x.states[I] + i)...};
    for (int e = 0; e < N; ++e) p.x[e] -= rule(p.x[e], clipped(g.x[e], x.coef, x.limit), s[I].x[e]...);
    *reinterpret_cast<V<N>*>(x.p + i) = p;
    if constexpr (!writes_in_measure<Rule>()) ((*reinterpret_cast<V<N>*>(x.states[I] + i) = s[I]), ...);
    if (x.ema) {
      V<N> a = *reinterpret_cast<const V<N>*>(x.ema + i);
      for (int e = 0; e < N; ++e) a.x[e] = averaged(a.x[e], p.x[e], x.weight);
      *reinterpret_cast<V<N>*>(x.ema + i) = a;
    }
    if (x.zero) *reinterpret_cast<V<N>*>(x.g + i) = V<N>{};
  }

  template <int N, class Rule, int... I>
  static PT_DEVICE void measure_at(const Rule& rule, const Streams<Rule>& x, int64_t i, double* sums,
                                   std::integer_sequence<int, I...>) {
    const V<N> p = *reinterpret_cast<const V<N>*>(x.p + i);
    const V<N> g = *reinterpret_cast<const V<N>*>(x.g + i);
    V<N> s[room<Rule>] = {*reinterpret_cast<const V<N>*>(x.states[I] + i)...};
    T total[rules::sum_count<Rule>()] = {};
    for (int e = 0; e < N; ++e) {
      T terms[rules::sum_count<Rule>()];
      rule.measure(p.x[e], clipped(g.x[e], x.coef, x.limit), s[I].x[e]..., terms);
      for (int k = 0; k < rules::sum_count<Rule>(); ++k) total[k] += terms[k];
    }
    for (int k = 0; k < rules::sum_count<Rule>(); ++k) sums[k] += static_cast<double>(total[k]);
    if constexpr (Rule::measure_writes) ((*reinterpret_cast<V<N>*>(x.states[I] + i) = s[I]), ...);
  }

  // Does `measure` leave the new states in memory?
  template <class Rule>
  static constexpr bool writes_in_measure() {
    if constexpr (rules::sum_count<Rule>() > 0) {
      return Rule::measure_writes;
    } else {
      return false;
    }
  }

  // Calls with(number of elements as a constant, where) for each of this thread's pieces of the chunk.
  template <class Rule, class With>
  static PT_DEVICE void each(const Streams<Rule>& x, int64_t n, With with) {
    const int64_t whole = x.is_aligned() ? n / width * width : 0;
    for (int64_t i = int64_t{threadIdx.x} * width; i < whole; i += threads * width) {
      with(std::integral_constant<int, width>{}, i);
    }
    for (int64_t i = whole + threadIdx.x; i < n; i += threads) with(std::integral_constant<int, 1>{}, i);
  }

  template <class Rule>
  static PT_DEVICE void update(const Rule& rule, const Part& part) {
    const Streams<Rule> x(part);
    each(x, part.n, [&](auto count, int64_t i) {
      update_at<decltype(count)::value>(rule, x, i, std::make_integer_sequence<int, rules::state_count<Rule>()>{});
    });
  }

  template <class Rule>
  static PT_DEVICE void measure(const Rule& rule, const Part& part, double* sums) {
    const Streams<Rule> x(part);
    each(x, part.n, [&](auto count, int64_t i) {
      measure_at<decltype(count)::value>(rule, x, i, sums,
                                         std::make_integer_sequence<int, rules::state_count<Rule>()>{});
    });
  }
};

}  // namespace pytrain::cuda
