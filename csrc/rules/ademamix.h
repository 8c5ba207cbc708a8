// AdEMAMix. Pagliardini, Ablin & Grangier 2024, The AdEMAMix Optimizer: Better, Faster, Older, Alg. 1
// (arXiv:2409.03137).
//   m <- b1 m + (1-b1) g      s <- b3(t) s + (1-b3(t)) g      v <- b2 v + (1-b2) g^2
//   u  = lr ( (m/(1-b1^t) + alpha(t) s) / (sqrt(v/(1-b2^t)) + eps) + wd p )        p <- p - u
// Over the first T steps alpha(t) = alpha t/T, and 1/ln b3(t) goes linearly from 1/ln b1 to 1/ln b3: so does the
// average's half-life. T = 0 is none of that.
#pragma once

#include "rules/rule.h"

namespace pytrain::PT_ISA::rules {

struct AdEMAMix {
  static constexpr const char* name = "ademamix";
  static constexpr const char* states[] = {"exp_avg", "exp_avg_slow", "exp_avg_sq"};
  static constexpr const char* hypers[] = {"lr",    "beta1", "beta2",         "beta3",
                                           "alpha", "eps",   "weight_decay", "T_alpha_beta3"};
  static constexpr bool counts = true;
  struct Hyper {
    double lr, beta1, beta2, beta3, alpha, eps, weight_decay, T_alpha_beta3;
  };
  double weight1, weight3, beta2, weight2, fast_size, slow_size, inv_root2, eps, decay;

  PT_HD AdEMAMix(const Hyper& h, double t)
      : weight1(1.0 - h.beta1),
        weight3(1.0 - slow_beta(h, t)),
        beta2(h.beta2),
        weight2(1.0 - h.beta2),
        fast_size(h.lr / (1.0 - power(h.beta1, t))),
        slow_size(h.lr * (t < h.T_alpha_beta3 ? h.alpha * (t / h.T_alpha_beta3) : h.alpha)),
        inv_root2(1.0 / square_root(1.0 - power(h.beta2, t))),
        eps(h.eps),
        decay(h.lr * h.weight_decay) {}

  PT_HD static double inverse_logarithm(double beta) { return beta > 0.0 ? 1.0 / logarithm(beta) : 0.0; }

  PT_HD static double slow_beta(const Hyper& h, double t) {
    if (!(t < h.T_alpha_beta3)) return h.beta3;
    const double share = t / h.T_alpha_beta3;
    const double mixed = (1.0 - share) * inverse_logarithm(h.beta1) + share * inverse_logarithm(h.beta3);
    const double beta = mixed < 0.0 ? exponential(1.0 / mixed) : 0.0;
    return beta < h.beta3 ? beta : h.beta3;
  }

  template <class T>
  PT_HD T operator()(T p, T g, T& m, T& s, T& v) const {
    m = lerp(m, g, T(weight1));
    s = lerp(s, g, T(weight3));
    v = T(beta2) * v + T(weight2) * g * g;
    const T mixed = T(fast_size) * m + T(slow_size) * s;
    return mixed / (square_root(v) * T(inv_root2) + T(eps)) + decayed(p, T(decay));
  }
};

}  // namespace pytrain::PT_ISA::rules
