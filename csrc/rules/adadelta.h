// Adadelta. Zeiler 2012, ADADELTA: An Adaptive Learning Rate Method, Alg. 1 (arXiv:1212.5701).
//   g <- g + wd p
//   v <- rho v + (1-rho) g^2        d = sqrt(a + eps) / sqrt(v + eps) g        a <- rho a + (1-rho) d^2
//   u  = lr d        p <- p - u
#pragma once

#include "rules/rule.h"

namespace pytrain::PT_ISA::rules {

struct Adadelta {
  static constexpr const char* name = "adadelta";
  static constexpr const char* states[] = {"square_avg", "acc_delta"};
  static constexpr const char* hypers[] = {"lr", "rho", "eps", "weight_decay"};
  static constexpr bool counts = false;
  struct Hyper {
    double lr, rho, eps, weight_decay;
  };
  double lr, rho, fresh, eps, weight_decay;

  PT_HD Adadelta(const Hyper& h, double)
      : lr(h.lr), rho(h.rho), fresh(1.0 - h.rho), eps(h.eps), weight_decay(h.weight_decay) {}

  template <class T>
  PT_HD T operator()(T p, T g, T& v, T& a) const {
    g = penalized(g, p, T(weight_decay));
    v = T(rho) * v + T(fresh) * g * g;
    const T delta = square_root(a + T(eps)) / square_root(v + T(eps)) * g;
    a = T(rho) * a + T(fresh) * delta * delta;
    return T(lr) * delta;
  }
};

}  // namespace pytrain::PT_ISA::rules
