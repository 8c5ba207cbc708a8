// LARS. You, Gitman & Ginsburg 2017, Large Batch Training of Convolutional Networks, Alg. 1 (arXiv:1708.03888).
//   l  = eta ||p|| / (||g|| + wd ||p||), where ||p|| or ||g|| is 0: 1
//   b <- mu b + lr l (g + wd p)        u = b        p <- p - u
// The norms are those of the whole tensor. The rate is within the momentum, as in the paper, unlike in SGD.
#pragma once

#include "rules/rule.h"

namespace pytrain::PT_ISA::rules {

struct Lars {
  static constexpr const char* name = "lars";
  static constexpr const char* states[] = {"momentum_buffer"};
  static constexpr const char* hypers[] = {"lr", "weight_decay", "momentum", "trust_coefficient"};
  static constexpr bool counts = false;
  static constexpr int sums = 2;
  static constexpr bool measure_writes = false;
  struct Hyper {
    double lr, weight_decay, momentum, trust_coefficient;
  };
  double lr, weight_decay, momentum, trust_coefficient, rate = 1.0;

  PT_HD Lars(const Hyper& h, double)
      : lr(h.lr), weight_decay(h.weight_decay), momentum(h.momentum), trust_coefficient(h.trust_coefficient) {}

  template <class T>
  PT_HD void measure(T p, T g, const T&, T* terms) const {
    terms[0] = p * p;
    terms[1] = g * g;
  }
  PT_HD void settle(const double* totals, double) {
    const double p_norm = square_root(totals[0]), g_norm = square_root(totals[1]);
    const bool no_ratio = p_norm == 0.0 || g_norm == 0.0;
    rate = no_ratio ? lr : lr * (trust_coefficient * p_norm / (g_norm + weight_decay * p_norm));
  }
  template <class T>
  PT_HD T operator()(T p, T g, T& b) const {
    b = T(momentum) * b + T(rate) * penalized(g, p, T(weight_decay));
    return b;
  }
};

}  // namespace pytrain::PT_ISA::rules
