// Averaged SGD. Polyak & Juditsky 1992, Acceleration of Stochastic Approximation by Averaging (SIAM J. Control Optim.
// 30); the step sizes of Xu 2011, Towards Optimal One Pass Large Scale Learning with Averaged SGD (arXiv:1107.2490).
//   g <- g + wd p
//   u  = eta_t (lambd p + g)        p <- p - u
//   ax <- ax + mu_t (p - ax)
//   eta_{t+1} = lr / (1 + lambd lr t)^alpha      mu_{t+1} = 1 / max(1, t - t0)        eta_1 = lr, mu_1 = 1
#pragma once

#include "rules/rule.h"

namespace pytrain::PT_ISA::rules {

struct ASGD {
  static constexpr const char* name = "asgd";
  static constexpr const char* states[] = {"ax"};
  static constexpr const char* scalars[] = {"eta", "mu"};
  static constexpr const char* hypers[] = {"lr", "lambd", "alpha", "t0", "weight_decay"};
  static constexpr bool counts = true;
  struct Hyper {
    double lr, lambd, alpha, t0, weight_decay;
  };
  double eta, mu, decay, weight_decay;

  PT_HD ASGD(const Hyper& h, double, const double* scalars)
      : eta(scalars[0]), mu(scalars[1]), decay(h.lambd * scalars[0]), weight_decay(h.weight_decay) {}

  PT_HD static void advance(const Hyper& h, double t, double* scalars) {
    scalars[0] = h.lr / real_power(1.0 + h.lambd * h.lr * t, h.alpha);
    scalars[1] = t - h.t0 > 1.0 ? 1.0 / (t - h.t0) : 1.0;
  }

  template <class T>
  PT_HD T operator()(T p, T g, T& ax) const {
    const T u = T(eta) * penalized(g, p, T(weight_decay)) + decayed(p, T(decay));
    const T next = p - u, mean = ax + T(mu) * (next - ax);
    ax = mu == 1.0 ? next : mean;  // nothing of the old average, be it infinite
    return u;
  }
};

}  // namespace pytrain::PT_ISA::rules
