// Lion. Chen et al. 2023, Symbolic Discovery of Optimization Algorithms, Alg. 2 (arXiv:2302.06675).
//   u  = lr ( sign(b1 m + (1-b1) g) + wd p )
//   m <- b2 m + (1-b2) g        p <- p - u
#pragma once

#include "rules/rule.h"

namespace pytrain::PT_ISA::rules {

struct Lion {
  static constexpr const char* name = "lion";
  static constexpr const char* states[] = {"exp_avg"};
  static constexpr const char* hypers[] = {"lr", "beta1", "beta2", "weight_decay"};
  static constexpr bool counts = false;
  struct Hyper {
    double lr, beta1, beta2, weight_decay;
  };
  double lr, beta1, weight1, weight2, decay;

  PT_HD Lion(const Hyper& h, double)
      : lr(h.lr), beta1(h.beta1), weight1(1.0 - h.beta1), weight2(1.0 - h.beta2), decay(h.lr * h.weight_decay) {}

  template <class T>
  PT_HD T operator()(T p, T g, T& m) const {
    const T direction = sign(T(beta1) * m + T(weight1) * g);
    m = lerp(m, g, T(weight2));
    return T(lr) * direction + decayed(p, T(decay));
  }
};

}  // namespace pytrain::PT_ISA::rules
