// Adam. Kingma & Ba 2015, Adam: A Method for Stochastic Optimization, Alg. 1 (arXiv:1412.6980).
//   g <- g + wd p
//   m <- b1 m + (1-b1) g      v <- b2 v + (1-b2) g^2
//   u  = lr (m/(1-b1^t)) / (sqrt(v/(1-b2^t)) + eps)        p <- p - u
// AMSGrad. Reddi, Kale & Kumar 2018 (arXiv:1904.09237): the root is taken of the largest v so far.
#pragma once

#include "rules/rule.h"

namespace pytrain::PT_ISA::rules {

// The two moments and the step along them; shared with AdamW, which decays elsewhere.
struct AdamMoments {
  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay;
  };
  double weight1, beta2, weight2, step_size, inv_root2, eps;

  PT_HD AdamMoments(const Hyper& h, double t)
      : weight1(1.0 - h.beta1),
        beta2(h.beta2),
        weight2(1.0 - h.beta2),
        step_size(h.lr / (1.0 - power(h.beta1, t))),
        inv_root2(1.0 / square_root(1.0 - power(h.beta2, t))),
        eps(h.eps) {}

  template <class T>
  PT_HD void average(T g, T& m, T& v) const {
    m = lerp(m, g, T(weight1));
    v = T(beta2) * v + T(weight2) * g * g;
  }
  template <class T>
  PT_HD T direction(T m, T v) const {
    return T(step_size) * m / (square_root(v) * T(inv_root2) + T(eps));
  }
};

struct Adam : AdamMoments {
  static constexpr const char* name = "adam";
  static constexpr const char* states[] = {"exp_avg", "exp_avg_sq"};
  static constexpr const char* hypers[] = {"lr", "beta1", "beta2", "eps", "weight_decay"};
  static constexpr bool counts = true;
  double weight_decay;

  PT_HD Adam(const Hyper& h, double t) : AdamMoments(h, t), weight_decay(h.weight_decay) {}

  template <class T>
  PT_HD T operator()(T p, T g, T& m, T& v) const {
    average(penalized(g, p, T(weight_decay)), m, v);
    return direction(m, v);
  }
};

struct AdamAmsgrad : Adam {
  static constexpr const char* name = "adam_amsgrad";
  static constexpr const char* states[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};

  PT_HD AdamAmsgrad(const Hyper& h, double t) : Adam(h, t) {}

  template <class T>
  PT_HD T operator()(T p, T g, T& m, T& v, T& largest) const {
    average(penalized(g, p, T(weight_decay)), m, v);
    largest = largest > v ? largest : v;
    return direction(m, largest);
  }
};

}  // namespace pytrain::PT_ISA::rules
