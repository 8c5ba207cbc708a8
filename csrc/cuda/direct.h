// Chunks whose parameter and states are all fp32, or all fp64: straight through memory, 16 bytes at a time.
#pragma once

#include "cuda/block.h"

namespace pytrain::cuda {

template <class T>
struct Direct {
  static constexpr int width = 16 / sizeof(T);

  template <class Rule>
  static constexpr int room = rules::state_count<Rule>() > 0 ? rules::state_count<Rule>() : 1;

  enum Stream { param, grad, average, first_state };

  // In shared memory: where a chunk's streams begin. A loop reads it anew at each access (volatile), because addresses
  // take more registers than elements.
  template <class Rule>
  struct Streams {
    static constexpr int count = first_state + rules::state_count<Rule>();
    T* begin[count];
    T coef, limit, weight;  // weight 0: no average moves
    bool is_aligned;

    PT_DEVICE void set(const Part& part) {
      begin[param] = static_cast<T*>(part.item.memory.param) + part.first;
      begin[grad] = static_cast<T*>(part.item.memory.grad) + part.first;
      begin[average] = part.ema_weight == 0.0 ? nullptr : static_cast<T*>(part.item.extra.ema) + part.first;
      for (int s = first_state; s < count; ++s) {
        begin[s] = static_cast<T*>(part.item.memory.states[s - first_state]) + part.first;
      }
      coef = T(part.coef);
      limit = T(limit_of(part.job));
      weight = T(part.ema_weight);
      is_aligned = true;
      for (int s = 0; s < count; ++s) is_aligned = is_aligned && aligned<T, width>(begin[s]);
    }

    template <class Elements>
    PT_DEVICE Elements* at(int stream, int i) const {
      return reinterpret_cast<Elements*>(global(*const_cast<T* const volatile*>(&begin[stream])) + i);
    }
  };

  template <int N>
  using V = Vec<T, N>;

  template <int N, class Rule, int... I>
  static PT_DEVICE void update_at(const Rule& rule, const Streams<Rule>& x, bool zero, int i,
                                  std::integer_sequence<int, I...>) {
    V<N> p = *x.template at<const V<N>>(param, i);
    const V<N> g = *x.template at<const V<N>>(grad, i);
    V<N> s[room<Rule>] = {*x.template at<const V<N>>(first_state + I, i)...};
    const T coef = x.coef, limit = x.limit, weight = x.weight;
    for (int e = 0; e < N; ++e) p.x[e] -= rule(p.x[e], clipped(g.x[e], coef, limit), s[I].x[e]...);
    *x.template at<V<N>>(param, i) = p;
    if constexpr (!writes_in_measure<Rule>()) ((*x.template at<V<N>>(first_state + I, i) = s[I]), ...);
    if (zero) *x.template at<V<N>>(grad, i) = V<N>{};
    if (weight == T(0)) return;
    V<N> a = *x.template at<const V<N>>(average, i);
    for (int e = 0; e < N; ++e) a.x[e] = averaged(a.x[e], p.x[e], weight);
    *x.template at<V<N>>(average, i) = a;
  }

  // Adds to the total of each sum.
  template <int N, class Rule, int... I>
  static PT_DEVICE void measure_at(const Rule& rule, const Streams<Rule>& x, int i, T* total,
                                   std::integer_sequence<int, I...>) {
    const V<N> p = *x.template at<const V<N>>(param, i);
    const V<N> g = *x.template at<const V<N>>(grad, i);
    V<N> s[room<Rule>] = {*x.template at<const V<N>>(first_state + I, i)...};
    for (int e = 0; e < N; ++e) {
      T terms[rules::sum_count<Rule>()];
      rule.measure(p.x[e], clipped(g.x[e], x.coef, x.limit), s[I].x[e]..., terms);
      for (int k = 0; k < rules::sum_count<Rule>(); ++k) total[k] += terms[k];
    }
    if constexpr (Rule::measure_writes) ((*x.template at<V<N>>(first_state + I, i) = s[I]), ...);
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

  // Calls with(number of elements as a constant, where) for each of this thread's pieces of the chunk: those of 16
  // bytes, then single elements.
  template <class Rule, class With>
  static PT_DEVICE void each(Streams<Rule>& x, const Part& part, With with) {
    if (threadIdx.x == 0) x.set(part);
    __syncthreads();
    const int n = static_cast<int>(part.n), vectors = x.is_aligned ? n / width : 0, beyond = vectors * (width - 1);
    for (int k = static_cast<int>(threadIdx.x); k < n - beyond; k += threads) {
      if (k < vectors) {
        with(std::integral_constant<int, width>{}, k * width);
      } else {
        with(std::integral_constant<int, 1>{}, k + beyond);
      }
    }
  }

  template <class Rule>
  static PT_DEVICE void update(const Rule& rule, const Part& part) {
    PT_SHARED(Streams<Rule>, x, 1);
    const bool zero = part.job.storage.zero_grad;
    each(*x, part, [&](auto count, int i) {
      update_at<decltype(count)::value>(rule, *x, zero, i,
                                        std::make_integer_sequence<int, rules::state_count<Rule>()>{});
    });
  }

  // A thread has the same elements wherever they lie, so that sums do not depend on it.
  template <class Rule>
  static PT_DEVICE void measure(const Rule& rule, const Part& part, double* sums) {
    constexpr auto states = std::make_integer_sequence<int, rules::state_count<Rule>()>{};
    PT_SHARED(Streams<Rule>, x, 1);
    if (threadIdx.x == 0) x->set(part);
    __syncthreads();
    const int n = static_cast<int>(part.n);
    for (int i = static_cast<int>(threadIdx.x) * width; i < n; i += threads * width) {
      T total[rules::sum_count<Rule>()] = {};
      if (x->is_aligned && i + width <= n) {
        measure_at<width>(rule, *x, i, total, states);
      } else {
        PT_ROLLED
        for (int e = i; e < n && e < i + width; ++e) measure_at<1>(rule, *x, e, total, states);
      }
      for (int k = 0; k < rules::sum_count<Rule>(); ++k) sums[k] += static_cast<double>(total[k]);
    }
  }
};

template <>
struct Traits<Direct<float>> {
  using Number = float;
  static constexpr int block = threads;
  // Six blocks are three quarters of 2,048 threads, at 40 of 65,536 registers. What has more states or numbers than
  // AdamW with AMSGrad would spill there.
  template <class Rule>
  static constexpr int resident = rules::state_count<Rule>() <= 3 && sizeof(Rule) <= 7 * sizeof(double) ? 6 : 4;
};
template <>
struct Traits<Direct<double>> : Traits<void> {
  using Number = double;
};

}  // namespace pytrain::cuda
