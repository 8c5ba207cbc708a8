// Adagrad. Duchi, Hazan & Singer 2011, Adaptive Subgradient Methods for Online Learning and Stochastic Optimization,
// JMLR 12, Fig. 1 with diagonal matrices; the decay of lr as in torch.optim.Adagrad.
//   g <- g + wd p        s <- s + g^2
//   u  = lr/(1 + (t-1) lr_decay) g / (sqrt(s) + eps)        p <- p - u
#pragma once

#include "rules/rule.h"

namespace pytrain::PT_ISA::rules {

struct Adagrad {
  static constexpr const char* name = "adagrad";
  static constexpr const char* states[] = {"sum"};
  static constexpr const char* hypers[] = {"lr", "lr_decay", "eps", "weight_decay"};
  static constexpr bool counts = true;
  struct Hyper {
    double lr, lr_decay, eps, weight_decay;
  };
  double step_size, eps, weight_decay;

  PT_HD Adagrad(const Hyper& h, double t)
      : step_size(h.lr / (1.0 + (t - 1.0) * h.lr_decay)), eps(h.eps), weight_decay(h.weight_decay) {}

  template <class T>
  PT_HD T operator()(T p, T g, T& sum) const {
    g = penalized(g, p, T(weight_decay));
    sum = sum + g * g;
    return T(step_size) * g / (square_root(sum) + T(eps));
  }
};

}  // namespace pytrain::PT_ISA::rules
