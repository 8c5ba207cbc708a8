// The contract of an update rule, and the few functions of floats that rules share.
//
// A rule is a pure function of floats. It is built once a (param group, step count) from its hyperparameters and
// then called for every element; it sees no pointers, dtypes, threads or tensors:
//
//   struct Rule {
//     static constexpr const char* name;            // name of the op, with a trailing underscore there
//     static constexpr const char* states[];        // the state tensors, in the order of operator()'s arguments
//     static constexpr const char* hypers[];        // the fields of Hyper, in their order
//     static constexpr bool counts;                 // does it use the step count t?
//     struct Hyper { double lr, ...; };             // doubles only
//     PT_HD Rule(const Hyper&, double t);           // coefficients, in double, once; t = 1 on the first step
//     template <class T> PT_HD T operator()(T p, T g, T& state...) const;   // returns the update u: p <- p - u
//   };
//
// A rule that keeps numbers of a whole tensor between steps (NAdam's product of momenta) has them as fp32 scalars:
//
//     static constexpr const char* scalars[];       // at most 2
//     PT_HD Rule(const Hyper&, double t, const double* scalars);            // as they were before this step
//     PT_HD static void advance(const Hyper&, double t, double* scalars);   // as they will be after it
//
// A rule that needs sums over a whole tensor (LAMB's norms) is called twice for each element; between the two it is
// told the sums, which come out the same for any number of threads and any instruction set:
//
//     static constexpr int sums;                    // how many, at most 2
//     static constexpr bool measure_writes;         // does measure change the states, and operator() read them only?
//     template <class T> PT_HD void measure(T p, T g, T& state..., T* terms) const;   // what is to be summed
//     PT_HD void settle(const double* sums, double numel);                  // then operator() is called
//     PT_HD static void advance(const Hyper&, double t, double* scalars, const double* sums);   // where it has scalars
//
// PT_ISA is the namespace of the instruction set that a file is compiled for. Every function that a kernel uses
// lives in it, so that the linker can never pick one machine's code for another's.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#ifndef PT_ISA
#define PT_ISA portable
#endif

#ifdef __CUDACC__
#define PT_HD __host__ __device__ __forceinline__
#else
#define PT_HD inline __attribute__((always_inline))
#endif

namespace pytrain::PT_ISA::rules {

// From a to b by w, in torch.lerp's two forms: exact for w = 0, for w = 1, and where a == b.
template <class T>
PT_HD T lerp(T a, T b, T w) {
  return w < T(0.5) ? a + w * (b - a) : b - (b - a) * (T(1) - w);
}

// The gradient with an L2 penalty. Without one p does not matter, be it infinite.
template <class T>
PT_HD T penalized(T g, T p, T weight_decay) {
  return weight_decay == T(0) ? g : g + weight_decay * p;
}

// The part of p that a decay takes away. An infinite p stays what it is, as it does where torch multiplies it by 1 - w.
template <class T>
PT_HD T decayed(T p, T w) {
  return std::abs(p) <= std::numeric_limits<T>::max() ? w * p : T(0);
}

// -1, 0 or 1; nan for nan, so that a bad gradient shows.
template <class T>
PT_HD T sign(T x) {
  const T one_or_zero = T(x > T(0)) - T(x < T(0));
  return x == x ? one_or_zero : x;
}

template <class T>
PT_HD T square_root(T x) {
  return std::sqrt(x);
}

// base^t for a whole t >= 0 by repeated squaring: the same bits on every machine, which libm's pow does not promise.
PT_HD double power(double base, double t) {
  double result = 1.0;
  for (int64_t n = static_cast<int64_t>(t); n > 0; n >>= 1) {
    if (n & 1) result *= base;
    base *= base;
  }
  return result;
}

// e^x and the natural logarithm from sums and products alone, for the same reason; to about an ulp and a half.
PT_HD double exponential(double x) {
  const double n = std::floor(x * 1.4426950408889634 + 0.5);
  const double r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;  // ln 2 in two parts
  double sum = 1.0;
  for (int k = 18; k > 0; --k) sum = 1.0 + sum * r / k;
  return std::ldexp(sum, static_cast<int>(n));
}

PT_HD double logarithm(double x) {
  int n;
  double m = std::frexp(x, &n);  // in [0.5, 1)
  if (m < 0.70710678118654752) {
    m *= 2.0;
    --n;
  }
  const double s = (m - 1.0) / (m + 1.0), s2 = s * s;
  double sum = 0.0;
  for (int k = 23; k > 0; k -= 2) sum = sum * s2 + 1.0 / k;
  return n * 1.90821492927058770002e-10 + (2.0 * s * sum + n * 0.693147180369123816490);
}

// base^x for base > 0 and any x.
PT_HD double real_power(double base, double x) { return exponential(x * logarithm(base)); }

}  // namespace pytrain::PT_ISA::rules
