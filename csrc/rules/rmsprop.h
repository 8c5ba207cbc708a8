// RMSprop. Tieleman & Hinton 2012, Neural Networks for Machine Learning, lecture 6.5; centered as in Graves 2013,
// Generating Sequences With Recurrent Neural Networks, eqs. 38-41 (arXiv:1308.0850), with eps outside of the root.
//   g <- g + wd p
//   v <- a v + (1-a) g^2      c <- a c + (1-a) g
//   d  = g / (sqrt(v) + eps) | g / (sqrt(v - c^2) + eps) (centered)
//   u  = lr d | lr b with b <- mu b + d (momentum)        p <- p - u
#pragma once

#include "rules/rule.h"

namespace pytrain::PT_ISA::rules {

struct RMSprop {
  static constexpr const char* name = "rmsprop";
  static constexpr const char* states[] = {"square_avg"};
  static constexpr const char* hypers[] = {"lr", "alpha", "eps", "weight_decay", "momentum"};
  static constexpr bool counts = false;
  struct Hyper {
    double lr, alpha, eps, weight_decay, momentum;  // the variants without a buffer leave momentum alone
  };
  double lr, alpha, fresh, eps, weight_decay, momentum;

  PT_HD RMSprop(const Hyper& h, double)
      : lr(h.lr),
        alpha(h.alpha),
        fresh(1.0 - h.alpha),
        eps(h.eps),
        weight_decay(h.weight_decay),
        momentum(h.momentum) {}

  template <class T>
  PT_HD T direction(T p, T g, T& v) const {
    g = penalized(g, p, T(weight_decay));
    v = T(alpha) * v + T(fresh) * g * g;
    return g / (square_root(v) + T(eps));
  }
  template <class T>
  PT_HD T centered(T p, T g, T& v, T& mean) const {
    g = penalized(g, p, T(weight_decay));
    v = T(alpha) * v + T(fresh) * g * g;
    mean = lerp(mean, g, T(fresh));
    // Rounding, above all of states kept in few bits, can make it negative; torch's is nan then.
    const T variance = v - mean * mean;
    return g / (square_root(variance < T(0) ? T(0) : variance) + T(eps));
  }

  template <class T>
  PT_HD T operator()(T p, T g, T& v) const {
    return T(lr) * direction(p, g, v);
  }
};

struct RMSpropMomentum : RMSprop {
  static constexpr const char* name = "rmsprop_momentum";
  static constexpr const char* states[] = {"square_avg", "momentum_buffer"};

  PT_HD RMSpropMomentum(const Hyper& h, double t) : RMSprop(h, t) {}

  template <class T>
  PT_HD T operator()(T p, T g, T& v, T& b) const {
    b = T(momentum) * b + direction(p, g, v);
    return T(lr) * b;
  }
};

struct RMSpropCentered : RMSprop {
  static constexpr const char* name = "rmsprop_centered";
  static constexpr const char* states[] = {"square_avg", "grad_avg"};

  PT_HD RMSpropCentered(const Hyper& h, double t) : RMSprop(h, t) {}

  template <class T>
  PT_HD T operator()(T p, T g, T& v, T& mean) const {
    return T(lr) * centered(p, g, v, mean);
  }
};

struct RMSpropCenteredMomentum : RMSprop {
  static constexpr const char* name = "rmsprop_centered_momentum";
  static constexpr const char* states[] = {"square_avg", "momentum_buffer", "grad_avg"};

  PT_HD RMSpropCenteredMomentum(const Hyper& h, double t) : RMSprop(h, t) {}

  template <class T>
  PT_HD T operator()(T p, T g, T& v, T& b, T& mean) const {
    b = T(momentum) * b + centered(p, g, v, mean);
    return T(lr) * b;
  }
};

}  // namespace pytrain::PT_ISA::rules
