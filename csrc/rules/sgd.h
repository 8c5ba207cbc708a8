// SGD with momentum. Sutskever et al. 2013, in the form that torch.optim.SGD documents.
//   g <- g + wd p
//   b <- g on the first step, else mu b + (1 - damp) g
//   u  = lr g (no momentum) | lr b | lr (g + mu b) (Nesterov)        p <- p - u
#pragma once

#include "rules/rule.h"

namespace pytrain::PT_ISA::rules {

struct SGD {
  static constexpr const char* name = "sgd";
  static constexpr const char* const* states = nullptr;  // none
  static constexpr const char* hypers[] = {"lr", "weight_decay"};
  static constexpr bool counts = false;
  struct Hyper {
    double lr, weight_decay;
  };
  double lr, weight_decay;

  PT_HD SGD(const Hyper& h, double) : lr(h.lr), weight_decay(h.weight_decay) {}

  template <class T>
  PT_HD T operator()(T p, T g) const {
    return T(lr) * penalized(g, p, T(weight_decay));
  }
};

struct SGDMomentum {
  static constexpr const char* name = "sgd_momentum";
  static constexpr const char* states[] = {"momentum_buffer"};
  static constexpr const char* hypers[] = {"lr", "weight_decay", "momentum", "dampening"};
  static constexpr bool counts = true;
  struct Hyper {
    double lr, weight_decay, momentum, dampening;
  };
  double lr, weight_decay, keep, momentum, fresh;

  PT_HD SGDMomentum(const Hyper& h, double t)
      : lr(h.lr),
        weight_decay(h.weight_decay),
        keep(t > 1.0 ? h.momentum : 0.0),
        momentum(h.momentum),
        fresh(t > 1.0 ? 1.0 - h.dampening : 1.0) {}

  template <class T>
  PT_HD T operator()(T p, T g, T& b) const {
    b = T(keep) * b + T(fresh) * penalized(g, p, T(weight_decay));
    return T(lr) * b;
  }
};

struct SGDNesterov : SGDMomentum {
  static constexpr const char* name = "sgd_nesterov";

  PT_HD SGDNesterov(const Hyper& h, double t) : SGDMomentum(h, t) {}

  template <class T>
  PT_HD T operator()(T p, T g, T& b) const {
    g = penalized(g, p, T(weight_decay));
    b = T(keep) * b + T(fresh) * g;
    return T(lr) * (g + T(momentum) * b);
  }
};

}  // namespace pytrain::PT_ISA::rules
