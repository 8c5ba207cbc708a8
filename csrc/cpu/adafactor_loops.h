// Adafactor's numbers of one step of one tensor, what it does to an element, and its loops over contiguous memory.
// The formula and the order of the passes stand in adafactor.h. Included once an instruction set.
#pragma once

#include "core/sum.h"
#include "rules/rule.h"

namespace pytrain::PT_ISA::cpu {

using rules::lerp;
using rules::real_power;
using rules::square_root;

// The numbers of one step of one tensor, and what it does to an element.
struct Adafactor {
  static constexpr const char* hypers[] = {"lr", "beta2_decay", "eps1", "eps2", "d", "weight_decay"};
  struct Hyper {
    double lr, beta2_decay, eps1, eps2, d, weight_decay;  // eps1 < 0 stands for type_eps
  };
  double weight, rho, eps1, eps2, d, keep;

  // t is 1 on the first step; type_eps is the distance from 1 to the next number of the parameter's dtype.
  PT_HD Adafactor(const Hyper& h, double t, double type_eps)
      : weight(real_power(t, h.beta2_decay)),
        rho(h.lr < 1.0 / square_root(t) ? h.lr : 1.0 / square_root(t)),
        eps1(h.eps1 < 0.0 ? type_eps : h.eps1),
        eps2(h.eps2),
        d(h.d),
        keep(1.0 - h.lr * h.weight_decay) {}

  // What u is multiplied by, from the sums of p^2 (before the decay) and u^2.
  PT_HD double step_size(double p_squares, double u_squares, double numel) const {
    const double rms = square_root(p_squares / numel), excess = square_root(u_squares / numel) / d;
    return rho * (rms > eps2 ? rms : eps2) / (excess > 1.0 ? excess : 1.0);
  }

  // 1/sqrt(r c / mean) is 1/sqrt(r / row_divisor(mean)) times 1/sqrt(c): no root and no division for an element.
  PT_HD double row_divisor(double mean) const { return mean < eps1 ? eps1 : mean; }

  template <class T>
  PT_HD static T factored(T g, T row_factor, T column_factor, T largest) {
    const T factor = row_factor * column_factor;
    return g * (factor > largest ? largest : factor);  // not the other way round: a nan stays one
  }
  template <class T>
  PT_HD static T unfactored(T g, T v, T eps1) {
    const T root = square_root(v);
    return g / (root < eps1 ? eps1 : root);
  }
};

// ---- the loops; not inlined, so that a disassembly can name them --------------------------------------------------

template <class T>
__attribute__((noinline)) void square(const T* __restrict__ x, T* __restrict__ to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = x[i] * x[i];
}

template <class T>
__attribute__((noinline)) void scaled_square(const T* __restrict__ g, T coef, T* __restrict__ to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = (g[i] * coef) * (g[i] * coef);
}

template <class T>
__attribute__((noinline)) void put_columns(const T* __restrict__ x, double* __restrict__ sums, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sums[i] = x[i];
}

template <class T>
__attribute__((noinline)) void add_to_columns(const T* __restrict__ x, double* __restrict__ sums, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sums[i] += x[i];
}

template <class T>
__attribute__((noinline)) void factored_squares(const T* __restrict__ g, T coef, T row,
                                                const T* __restrict__ col, T largest, T* __restrict__ to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const T u = Adafactor::factored(g[i] * coef, row, col[i], largest);
    to[i] = u * u;
  }
}

template <class T>
__attribute__((noinline)) void factored_update(T* __restrict__ p, const T* __restrict__ g, T coef, T row,
                                               const T* __restrict__ col, T largest, T keep, T size, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    p[i] = p[i] * keep - size * Adafactor::factored(g[i] * coef, row, col[i], largest);
  }
}

template <class T>
__attribute__((noinline)) void unfactored_squares(const T* __restrict__ g, T coef, T* __restrict__ v, T weight,
                                                  T eps1, T* __restrict__ to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const T scaled = g[i] * coef;
    const T next = lerp(v[i], scaled * scaled, weight);
    const T u = Adafactor::unfactored(scaled, next, eps1);
    v[i] = next;
    to[i] = u * u;
  }
}

template <class T>
__attribute__((noinline)) void unfactored_update(T* __restrict__ p, const T* __restrict__ g, T coef,
                                                 const T* __restrict__ v, T eps1, T keep, T size, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = p[i] * keep - size * Adafactor::unfactored(g[i] * coef, v[i], eps1);
}

template <class T>
__attribute__((noinline)) void average(T* __restrict__ var, const T* __restrict__ mean, T weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) var[i] = lerp(var[i], mean[i], weight);
}

template <class T>
__attribute__((noinline)) void inverse_roots(const T* __restrict__ x, double divisor, T* __restrict__ to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = T(1.0 / square_root(double(x[i]) / divisor));
}

}  // namespace pytrain::PT_ISA::cpu
