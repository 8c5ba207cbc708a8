// StableAdamW. Wortsman et al. 2023, Stable and low-precision training for large-scale vision-language models,
// section 3.5 (arXiv:2304.13013): AdamW with the update clipping of AdaFactor (arXiv:1804.04235).
//   b^ = b (1-b^(t-1)) / (1-b^t) for each beta: so are the moments without bias
//   m <- b1^ m + (1-b1^) g      v <- b2^ v + (1-b2^) g^2
//   r  = lr / max(1, RMS), RMS^2 = the mean of g^2 / max(v, eps^2) over the tensor
//   u  = r ( m / (sqrt(v) + eps) + wd p )        p <- p - u
#pragma once

#include "rules/rule.h"

namespace pytrain::PT_ISA::rules {

struct StableAdamW {
  static constexpr const char* name = "stableadamw";
  static constexpr const char* states[] = {"exp_avg", "exp_avg_sq"};
  static constexpr const char* hypers[] = {"lr", "beta1", "beta2", "eps", "weight_decay"};
  static constexpr bool counts = true;
  static constexpr int sums = 1;
  static constexpr bool measure_writes = false;
  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay;
  };
  double lr, weight1, weight2, beta2, eps, eps_squared, weight_decay, rate = 1.0, decay = 1.0;

  PT_HD StableAdamW(const Hyper& h, double t)
      : lr(h.lr),
        weight1((1.0 - h.beta1) / (1.0 - power(h.beta1, t))),  // 1 - b1^
        weight2((1.0 - h.beta2) / (1.0 - power(h.beta2, t))),
        beta2(1.0 - weight2),
        eps(h.eps),
        eps_squared(h.eps * h.eps),
        weight_decay(h.weight_decay) {}

  template <class T>
  PT_HD T average_square(T g, T v) const {
    return T(beta2) * v + T(weight2) * g * g;
  }
  template <class T>
  PT_HD void measure(T, T g, const T&, const T& v, T* terms) const {
    const T fresh = average_square(g, v);
    terms[0] = g * g / (fresh < T(eps_squared) ? T(eps_squared) : fresh);
  }
  PT_HD void settle(const double* totals, double numel) {
    const double rms = square_root(totals[0] / numel);
    rate = rms <= 1.0 ? lr : lr / rms;
    decay = rate * weight_decay;
  }
  template <class T>
  PT_HD T operator()(T p, T g, T& m, T& v) const {
    m = lerp(m, g, T(weight1));
    v = average_square(g, v);
    return T(rate) * m / (square_root(v) + T(eps)) + decayed(p, T(decay));
  }
};

}  // namespace pytrain::PT_ISA::rules
