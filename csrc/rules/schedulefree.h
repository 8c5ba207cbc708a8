// Schedule-Free AdamW. Defazio et al. 2024, The Road Less Scheduled, Alg. 1 (arXiv:2405.15682).
//   lr_t = lr min(1, t/warmup_steps)      largest <- max(largest, lr_t)
//   w  = t^r largest^weight_lr_power      W <- W + w      c = w/W        (one number each a tensor)
//   v <- b2 v + (1-b2) g^2                d = g / (sqrt(v/(1-b2^t)) + eps) + wd y
//   z <- z - lr_t d                       x <- (1-c) x + c z
// The parameter is y = (1-b1) z + b1 x, and x is not stored: y <- y - u with
//   u  = c (y - z) + lr_t (1 - b1 (1-c)) d, of z before its step.
#pragma once

#include "rules/rule.h"

namespace pytrain::PT_ISA::rules {

struct ScheduleFreeAdamW {
  static constexpr const char* name = "schedulefree_adamw";
  static constexpr const char* states[] = {"z", "exp_avg_sq"};
  static constexpr const char* hypers[] = {"lr",           "beta1",        "beta2", "eps",
                                           "weight_decay", "warmup_steps", "r",     "weight_lr_power"};
  static constexpr bool counts = true;
  static constexpr const char* scalars[] = {"weight_sum", "lr_max"};
  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, warmup_steps, r, weight_lr_power;
  };
  double beta2, weight2, inv_root2, eps, weight_decay, z_rate, z_weight, y_rate;

  PT_HD ScheduleFreeAdamW(const Hyper& h, double t, const double* before)
      : beta2(h.beta2),
        weight2(1.0 - h.beta2),
        inv_root2(1.0 / square_root(1.0 - power(h.beta2, t))),
        eps(h.eps),
        weight_decay(h.weight_decay),
        z_rate(warm(h, t)) {
    const double w = weight(h, t, largest(h, t, before[1])), sum = before[0] + w;
    z_weight = sum > 0.0 ? w / sum : 0.0;
    y_rate = z_rate * (1.0 - h.beta1 * (1.0 - z_weight));
  }

  PT_HD static double warm(const Hyper& h, double t) {
    return t < h.warmup_steps ? h.lr * (t / h.warmup_steps) : h.lr;
  }
  PT_HD static double largest(const Hyper& h, double t, double before) {
    const double rate = warm(h, t);
    return before > rate ? before : rate;
  }
  PT_HD static double weight(const Hyper& h, double t, double rate) {
    return rate > 0.0 ? real_power(t, h.r) * real_power(rate, h.weight_lr_power) : 0.0;
  }
  PT_HD static void advance(const Hyper& h, double t, double* scalars) {
    scalars[1] = largest(h, t, scalars[1]);
    scalars[0] += weight(h, t, scalars[1]);
  }

  template <class T>
  PT_HD T operator()(T y, T g, T& z, T& v) const {
    v = T(beta2) * v + T(weight2) * g * g;
    const T d = penalized(g / (square_root(v) * T(inv_root2) + T(eps)), y, T(weight_decay));
    const T u = T(z_weight) * (y - z) + T(y_rate) * d;
    z = z - T(z_rate) * d;
    return u;
  }
};

}  // namespace pytrain::PT_ISA::rules
