// NovoGrad. Ginsburg et al. 2019, Stochastic Gradient Methods with Layer-wise Adaptive Moments, Alg. 1
// (arXiv:1905.11286), the form whose first moment is a sum, not an average.
//   v <- ||g||^2 on the first step, else b2 v + (1-b2) ||g||^2        (one number a tensor)
//   m <- b1 m + g / (sqrt(v) + eps) + wd p        u = lr m        p <- p - u
#pragma once

#include "rules/rule.h"

namespace pytrain::PT_ISA::rules {

struct NovoGrad {
  static constexpr const char* name = "novograd";
  static constexpr const char* states[] = {"exp_avg"};
  static constexpr const char* hypers[] = {"lr", "beta1", "beta2", "eps", "weight_decay"};
  static constexpr bool counts = true;
  static constexpr const char* scalars[] = {"exp_avg_sq"};
  static constexpr int sums = 1;
  static constexpr bool measure_writes = false;
  struct Hyper {
    double lr, beta1, beta2, eps, weight_decay;
  };
  Hyper h;
  double t, before, inverse = 1.0;

  PT_HD NovoGrad(const Hyper& hyper, double step, const double* kept) : h(hyper), t(step), before(kept[0]) {}

  PT_HD static double average(const Hyper& h, double t, double v, double square) {
    return t > 1.0 ? h.beta2 * v + (1.0 - h.beta2) * square : square;
  }
  PT_HD static void advance(const Hyper& h, double t, double* scalars, const double* sums) {
    scalars[0] = average(h, t, scalars[0], sums[0]);
  }
  template <class T>
  PT_HD void measure(T, T g, const T&, T* terms) const {
    terms[0] = g * g;
  }
  PT_HD void settle(const double* totals, double) {
    inverse = 1.0 / (square_root(average(h, t, before, totals[0])) + h.eps);
  }
  template <class T>
  PT_HD T operator()(T p, T g, T& m) const {
    m = T(h.beta1) * m + penalized(T(inverse) * g, p, T(h.weight_decay));
    return T(h.lr) * m;
  }
};

}  // namespace pytrain::PT_ISA::rules
