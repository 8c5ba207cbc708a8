// AdamW. Loshchilov & Hutter 2019, Decoupled Weight Decay Regularization, Alg. 2 (arXiv:1711.05101).
//   m <- b1 m + (1-b1) g      v <- b2 v + (1-b2) g^2
//   u  = lr ( (m/(1-b1^t)) / (sqrt(v/(1-b2^t)) + eps) + wd p )        p <- p - u
// With AMSGrad (arXiv:1904.09237) the root is taken of the largest v so far.
#pragma once

#include "rules/adam.h"

namespace pytrain::PT_ISA::rules {

struct AdamW : AdamMoments {
  static constexpr const char* name = "adamw";
  static constexpr const char* states[] = {"exp_avg", "exp_avg_sq"};
  static constexpr const char* hypers[] = {"lr", "beta1", "beta2", "eps", "weight_decay"};
  static constexpr bool counts = true;
  double decay;

  PT_HD AdamW(const Hyper& h, double t) : AdamMoments(h, t), decay(h.lr * h.weight_decay) {}

  template <class T>
  PT_HD T operator()(T p, T g, T& m, T& v) const {
    average(g, m, v);
    return direction(m, v) + decayed(p, T(decay));
  }
};

struct AdamWAmsgrad : AdamW {
  static constexpr const char* name = "adamw_amsgrad";
  static constexpr const char* states[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};

  PT_HD AdamWAmsgrad(const Hyper& h, double t) : AdamW(h, t) {}

  template <class T>
  PT_HD T operator()(T p, T g, T& m, T& v, T& largest) const {
    average(g, m, v);
    largest = largest > v ? largest : v;
    return direction(m, largest) + decayed(p, T(decay));
  }
};

}  // namespace pytrain::PT_ISA::rules
