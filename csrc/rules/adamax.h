// Adamax: Adam with the largest gradient in place of the root mean square.
// Kingma & Ba 2015, Adam: A Method for Stochastic Optimization, Alg. 2 (arXiv:1412.6980), in torch.optim.Adamax's form.
//   g <- g + wd p
//   m <- b1 m + (1-b1) g      n <- max(b2 n, |g| + eps)
//   u  = lr/(1-b1^t) m / n        p <- p - u
#pragma once

#include "rules/rule.h"

namespace pytrain::PT_ISA::rules {

struct Adamax {
  static constexpr const char* name = "adamax";
  static constexpr const char* states[] = {"exp_avg", "exp_inf"};
  static constexpr const char* hypers[] = {"lr", "beta1", "beta2", "eps", "weight_decay"};
  static constexpr bool counts = true;
  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay;
  };
  double weight1, beta2, eps, weight_decay, step_size;

  PT_HD Adamax(const Hyper& h, double t)
      : weight1(1.0 - h.beta1),
        beta2(h.beta2),
        eps(h.eps),
        weight_decay(h.weight_decay),
        step_size(h.lr / (1.0 - power(h.beta1, t))) {}

  template <class T>
  PT_HD T operator()(T p, T g, T& m, T& norm) const {
    g = penalized(g, p, T(weight_decay));
    m = lerp(m, g, T(weight1));
    const T faded = T(beta2) * norm, fresh = std::abs(g) + T(eps);
    const T larger = faded > fresh ? faded : fresh;  // fresh, where that is nan
    norm = faded == faded ? larger : faded;
    return T(step_size) * m / norm;
  }
};

}  // namespace pytrain::PT_ISA::rules
