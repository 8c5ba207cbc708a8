// AdaBelief. Zhuang et al. 2020, AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients, Alg. 2
// (arXiv:2010.07468), with AdamW's decay, as in the authors' code with weight_decouple.
//   m <- b1 m + (1-b1) g      s <- b2 s + (1-b2) (g-m)^2 + eps
//   u  = lr ( (m/(1-b1^t)) / (sqrt(s/(1-b2^t)) + eps) + wd p )        p <- p - u
#pragma once

#include "rules/adam.h"

namespace pytrain::PT_ISA::rules {

struct AdaBelief : AdamMoments {
  static constexpr const char* name = "adabelief";
  static constexpr const char* states[] = {"exp_avg", "exp_avg_var"};
  static constexpr const char* hypers[] = {"lr", "beta1", "beta2", "eps", "weight_decay"};
  static constexpr bool counts = true;
  double decay;

  PT_HD AdaBelief(const Hyper& h, double t) : AdamMoments(h, t), decay(h.lr * h.weight_decay) {}

  template <class T>
  PT_HD T operator()(T p, T g, T& m, T& s) const {
    m = lerp(m, g, T(weight1));
    const T surprise = g - m;
    s = T(beta2) * s + T(weight2) * surprise * surprise + T(eps);
    return direction(m, s) + decayed(p, T(decay));
  }
};

}  // namespace pytrain::PT_ISA::rules
