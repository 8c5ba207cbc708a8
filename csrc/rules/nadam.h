// NAdam: Adam with Nesterov's momentum, whose decay mu_t grows with t.
// Dozat 2016, Incorporating Nesterov Momentum into Adam (ICLR workshop, openreview.net OM0jvwB8jIp57ZJjtNEZ), in
// torch.optim.NAdam's form.
//   g <- g + wd p
//   m <- b1 m + (1-b1) g      v <- b2 v + (1-b2) g^2
//   mu_t = b1 (1 - 0.96^(t psi) / 2)      M_t = mu_1 ... mu_t
//   u  = lr ( (1-mu_t)/(1-M_t) g + mu_{t+1}/(1-M_{t+1}) m ) / (sqrt(v/(1-b2^t)) + eps) + lr decay p        p <- p - u
#pragma once

#include "rules/adam.h"

namespace pytrain::PT_ISA::rules {

struct NAdam : AdamMoments {
  static constexpr const char* name = "nadam";
  static constexpr const char* states[] = {"exp_avg", "exp_avg_sq"};
  static constexpr const char* scalars[] = {"mu_product"};
  static constexpr const char* hypers[] = {"lr", "beta1", "beta2", "eps", "weight_decay", "decay", "momentum_decay"};
  static constexpr bool counts = true;
  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, decay, momentum_decay;
  };
  double weight_decay, decay, now, past;

  PT_HD NAdam(const Hyper& h, double t, const double* scalars)
      : AdamMoments({h.lr, h.beta1, h.beta2, h.eps, 0.0}, t), weight_decay(h.weight_decay), decay(h.lr * h.decay) {
    double product = scalars[0];
    advance(h, t, &product);
    const double next = momentum(h, t + 1.0);
    now = h.lr * (1.0 - momentum(h, t)) / (1.0 - product);
    past = h.lr * next / (1.0 - product * next);
  }

  PT_HD static double momentum(const Hyper& h, double t) {
    return h.beta1 * (1.0 - 0.5 * real_power(0.96, t * h.momentum_decay));
  }

  // In fp32, as torch multiplies it: the product is kept in fp32, and this step already uses what is kept.
  PT_HD static void advance(const Hyper& h, double t, double* scalars) {
    scalars[0] = static_cast<float>(scalars[0]) * static_cast<float>(momentum(h, t));
  }

  template <class T>
  PT_HD T operator()(T p, T g, T& m, T& v) const {
    g = penalized(g, p, T(weight_decay));
    average(g, m, v);
    return (T(now) * g + T(past) * m) / (square_root(v) * T(inv_root2) + T(eps)) + decayed(p, T(decay));
  }
};

}  // namespace pytrain::PT_ISA::rules
