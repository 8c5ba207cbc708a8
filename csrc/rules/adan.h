// Adan. Xie et al. 2022, Adan: Adaptive Nesterov Momentum Algorithm, Alg. 1 (arXiv:2208.06677), with its betas as
// decays (1 - beta there) and Adam's bias corrections, as in the authors' code.
//   d  = g - g_before, 0 on the first step        g_before <- g
//   m <- b1 m + (1-b1) g      w <- b2 w + (1-b2) d      n <- b3 n + (1-b3) (g + b2 d)^2
//   s  = lr (m/(1-b1^t) + b2 w/(1-b2^t)) / (sqrt(n/(1-b3^t)) + eps)
//   p <- (p - s) / (1 + lr wd), that is p - u with u = (s + lr wd p) / (1 + lr wd)
#pragma once

#include "rules/rule.h"

namespace pytrain::PT_ISA::rules {

struct Adan {
  static constexpr const char* name = "adan";
  static constexpr const char* states[] = {"exp_avg", "exp_avg_diff", "exp_avg_sq", "pre_grad"};
  static constexpr const char* hypers[] = {"lr", "beta1", "beta2", "beta3", "eps", "weight_decay"};
  static constexpr bool counts = true;
  struct Hyper {
    double lr, beta1, beta2, beta3, eps, weight_decay;
  };
  double fresh, weight1, beta2, weight2, beta3, weight3, shrink, step_size, diff_size, inv_root3, eps, decay;

  PT_HD Adan(const Hyper& h, double t)
      : fresh(t > 1.0 ? 1.0 : 0.0),
        weight1(1.0 - h.beta1),
        beta2(h.beta2),
        weight2(1.0 - h.beta2),
        beta3(h.beta3),
        weight3(1.0 - h.beta3),
        shrink(1.0 / (1.0 + h.lr * h.weight_decay)),
        step_size(shrink * h.lr / (1.0 - power(h.beta1, t))),
        diff_size(shrink * h.lr * h.beta2 / (1.0 - power(h.beta2, t))),
        inv_root3(1.0 / square_root(1.0 - power(h.beta3, t))),
        eps(h.eps),
        decay(shrink * h.lr * h.weight_decay) {}

  template <class T>
  PT_HD T operator()(T p, T g, T& m, T& w, T& n, T& g_before) const {
    const T d = T(fresh) * (g - g_before);
    const T ahead = g + T(beta2) * d;
    g_before = g;
    m = lerp(m, g, T(weight1));
    w = lerp(w, d, T(weight2));
    n = T(beta3) * n + T(weight3) * ahead * ahead;
    const T s = (T(step_size) * m + T(diff_size) * w) / (square_root(n) * T(inv_root3) + T(eps));
    return s + decayed(p, T(decay));
  }
};

}  // namespace pytrain::PT_ISA::rules
