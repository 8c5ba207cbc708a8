// RAdam: Adam whose adaptive step waits, and then is damped, until enough gradients have been seen to trust it.
// Liu et al. 2020, On the Variance of the Adaptive Learning Rate and Beyond, Alg. 2 (arXiv:1908.03265), in
// torch.optim.RAdam's form: eps is added before the correction of v, and the step is rectified where rho_t > 5.
//   g <- g + wd p
//   m <- b1 m + (1-b1) g      v <- b2 v + (1-b2) g^2
//   rho = 2/(1-b2) - 1        rho_t = rho - 2 t b2^t / (1-b2^t)
//   r   = sqrt( (rho_t-4)(rho_t-2) rho / ((rho-4)(rho-2) rho_t) )
//   u   = lr m/(1-b1^t) ( rho_t > 5 ? r sqrt(1-b2^t) / (sqrt(v) + eps) : 1 ) + lr decay p        p <- p - u
#pragma once

#include "rules/adam.h"

namespace pytrain::PT_ISA::rules {

struct RAdam : AdamMoments {
  static constexpr const char* name = "radam";
  static constexpr const char* states[] = {"exp_avg", "exp_avg_sq"};
  static constexpr const char* hypers[] = {"lr", "beta1", "beta2", "eps", "weight_decay", "decay"};
  static constexpr bool counts = true;
  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, decay;
  };
  double weight_decay, decay, scale, rectified, rest;

  PT_HD RAdam(const Hyper& h, double t)
      : AdamMoments({h.lr, h.beta1, h.beta2, h.eps, 0.0}, t), weight_decay(h.weight_decay), decay(h.lr * h.decay) {
    const double kept = power(h.beta2, t), correction = 1.0 - kept;
    const double rho = 2.0 / (1.0 - h.beta2) - 1.0;
    const double rho_t = rho - 2.0 * t * kept / correction;
    rectified = rho_t > 5.0 ? 1.0 : 0.0;
    rest = rho_t > 5.0 ? h.eps : 1.0;
    const double square = (rho_t - 4.0) * (rho_t - 2.0) * rho / ((rho - 4.0) * (rho - 2.0) * rho_t);
    scale = rho_t > 5.0 ? step_size * square_root(correction) * square_root(square) : step_size;
  }

  template <class T>
  PT_HD T operator()(T p, T g, T& m, T& v) const {
    average(penalized(g, p, T(weight_decay)), m, v);
    // Without rectification the root counts 0 times; that of an infinite v must not make it nan.
    const T root = square_root(v < std::numeric_limits<T>::max() ? v : std::numeric_limits<T>::max());
    return T(scale) * m / (root * T(rectified) + T(rest)) + decayed(p, T(decay));
  }
};

}  // namespace pytrain::PT_ISA::rules
