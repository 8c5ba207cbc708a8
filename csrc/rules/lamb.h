// LAMB. You et al. 2020, Large Batch Optimization for Deep Learning, Alg. 2 with phi(x) = x (arXiv:1904.00962).
//   m <- b1 m + (1-b1) g      v <- b2 v + (1-b2) g^2
//   d  = (m/(1-b1^t)) / (sqrt(v/(1-b2^t)) + eps) + wd p
//   u  = lr ||p||/||d|| d, where either norm is 0: lr d        p <- p - u
// The norms are those of the whole tensor.
#pragma once

#include "rules/adam.h"

namespace pytrain::PT_ISA::rules {

struct Lamb : AdamMoments {
  static constexpr const char* name = "lamb";
  static constexpr const char* states[] = {"exp_avg", "exp_avg_sq"};
  static constexpr const char* hypers[] = {"lr", "beta1", "beta2", "eps", "weight_decay"};
  static constexpr bool counts = true;
  static constexpr int sums = 2;
  static constexpr bool measure_writes = true;
  double lr, weight_decay, rate = 1.0;

  PT_HD Lamb(const Hyper& h, double t)
      : AdamMoments(Hyper{1.0, h.beta1, h.beta2, h.eps, 0.0}, t), lr(h.lr), weight_decay(h.weight_decay) {}

  template <class T>
  PT_HD T decayed_direction(T p, T m, T v) const {
    return penalized(direction(m, v), p, T(weight_decay));
  }
  template <class T>
  PT_HD void measure(T p, T g, T& m, T& v, T* terms) const {
    average(g, m, v);
    const T d = decayed_direction(p, m, v);
    terms[0] = p * p;
    terms[1] = d * d;
  }
  PT_HD void settle(const double* totals, double) {
    rate = totals[0] == 0.0 || totals[1] == 0.0 ? lr : lr * (square_root(totals[0]) / square_root(totals[1]));
  }
  template <class T>
  PT_HD T operator()(T p, T, const T& m, const T& v) const {
    return T(rate) * decayed_direction(p, m, v);
  }
};

}  // namespace pytrain::PT_ISA::rules
