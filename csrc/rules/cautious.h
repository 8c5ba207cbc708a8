// Cautious AdamW and Lion. Liang et al. 2024, Cautious Optimizers, Alg. 1 and 2 (arXiv:2411.16085).
//   d  = the direction of AdamW or Lion without decay        k = 1 where d g > 0, else 0
//   u  = lr ( d k / max(mean(k), 0.001) + wd p )        p <- p - u
// The mean is that of the whole tensor.
#pragma once

#include "rules/adam.h"
#include "rules/lion.h"

namespace pytrain::PT_ISA::rules {

// 1 where a and b are both above or both below zero, else 0: by their signs, as a product can vanish.
template <class T>
PT_HD T agree(T a, T b) {
  return T(sign(a) * sign(b) > T(0));
}

// What makes up for the directions that are left out.
PT_HD double compensation(double kept, double numel) {
  const double mean = kept / numel;
  return 1.0 / (mean < 1e-3 ? 1e-3 : mean);
}

struct CautiousAdamW : AdamMoments {
  static constexpr const char* name = "cautious_adamw";
  static constexpr const char* states[] = {"exp_avg", "exp_avg_sq"};
  static constexpr const char* hypers[] = {"lr", "beta1", "beta2", "eps", "weight_decay"};
  static constexpr bool counts = true;
  static constexpr int sums = 1;
  static constexpr bool measure_writes = false;
  double decay, scale = 1.0;

  PT_HD CautiousAdamW(const Hyper& h, double t) : AdamMoments(h, t), decay(h.lr * h.weight_decay) {}

  template <class T>
  PT_HD void measure(T, T g, const T& m, const T&, T* terms) const {
    terms[0] = agree(lerp(m, g, T(weight1)), g);  // a direction has the sign of its first moment
  }
  PT_HD void settle(const double* totals, double numel) { scale = compensation(totals[0], numel); }

  template <class T>
  PT_HD T operator()(T p, T g, T& m, T& v) const {
    average(g, m, v);
    return direction(m, v) * (agree(m, g) * T(scale)) + decayed(p, T(decay));
  }
};

struct CautiousLion {
  static constexpr const char* name = "cautious_lion";
  static constexpr const char* states[] = {"exp_avg"};
  static constexpr const char* hypers[] = {"lr", "beta1", "beta2", "weight_decay"};
  static constexpr bool counts = false;
  static constexpr int sums = 1;
  static constexpr bool measure_writes = false;
  using Hyper = Lion::Hyper;
  double lr, beta1, weight1, weight2, decay, scale = 1.0;

  PT_HD CautiousLion(const Hyper& h, double)
      : lr(h.lr), beta1(h.beta1), weight1(1.0 - h.beta1), weight2(1.0 - h.beta2), decay(h.lr * h.weight_decay) {}

  template <class T>
  PT_HD T mixed(T g, T m) const {
    return T(beta1) * m + T(weight1) * g;
  }
  template <class T>
  PT_HD void measure(T, T g, const T& m, T* terms) const {
    terms[0] = agree(mixed(g, m), g);
  }
  PT_HD void settle(const double* totals, double numel) { scale = compensation(totals[0], numel); }

  template <class T>
  PT_HD T operator()(T p, T g, T& m) const {
    const T direction = mixed(g, m);
    m = lerp(m, g, T(weight2));
    return T(lr) * sign(direction) * (agree(direction, g) * T(scale)) + decayed(p, T(decay));
  }
};

}  // namespace pytrain::PT_ISA::rules
