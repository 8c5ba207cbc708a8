// Rprop without backtracking. Riedmiller & Braun 1993, A Direct Adaptive Method for Faster Backpropagation Learning:
// The RPROP Algorithm (IEEE ICNN); as in Igel & Huesken 2000 (iRprop-), a change of sign drops the gradient.
//   f    = eta+ if g prev > 0 | eta- if g prev < 0 | 1        step <- clamp(f step, step_min, step_max)
//   prev <- 0 if g prev < 0 | g
//   u    = sign(prev) step        p <- p - u
#pragma once

#include "rules/rule.h"

namespace pytrain::PT_ISA::rules {

struct Rprop {
  static constexpr const char* name = "rprop";
  static constexpr const char* states[] = {"prev", "step_size"};
  static constexpr const char* hypers[] = {"etaminus", "etaplus", "step_size_min", "step_size_max"};
  static constexpr bool counts = false;
  struct Hyper {
    double etaminus, etaplus, step_size_min, step_size_max;
  };
  double etaminus, etaplus, step_size_min, step_size_max;

  PT_HD Rprop(const Hyper& h, double)
      : etaminus(h.etaminus), etaplus(h.etaplus), step_size_min(h.step_size_min), step_size_max(h.step_size_max) {}

  template <class T>
  PT_HD T operator()(T, T g, T& prev, T& step_size) const {
    const T same = g * prev;
    const T less = same < T(0) ? T(etaminus) : T(1);
    const T size = step_size * (same > T(0) ? T(etaplus) : less);
    const T raised = size < T(step_size_min) ? T(step_size_min) : size;
    step_size = raised > T(step_size_max) ? T(step_size_max) : raised;
    prev = same < T(0) ? T(0) : g;
    return sign(prev) * step_size;
  }
};

}  // namespace pytrain::PT_ISA::rules
