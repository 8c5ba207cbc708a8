// Sums that come out the same for every instruction set: eight double lanes, in a fixed order.
#pragma once

#include <cstdint>
#include <cstring>

#include "rules/rule.h"

namespace pytrain::PT_ISA::core {

constexpr int sum_lanes = 8;

// A vector of eight doubles, which the compiler splits into what the instruction set has.
typedef double Lanes __attribute__((vector_size(sum_lanes * sizeof(double))));
typedef float FloatLanes __attribute__((vector_size(sum_lanes * sizeof(float))));

PT_HD void add_lanes(Lanes& total, const double* x) {
  Lanes lanes;
  std::memcpy(&lanes, x, sizeof lanes);
  total += lanes;
}

PT_HD void add_lanes(Lanes& total, const float* x) {
  FloatLanes lanes;
  std::memcpy(&lanes, x, sizeof lanes);
  total += __builtin_convertvector(lanes, Lanes);
}

// The sum of n numbers: lane i % 8 takes number i, then the lanes are added from the first to the last.
template <class T>
__attribute__((noinline)) double sum(const T* x, int64_t n) {
  Lanes total = {};
  int64_t i = 0;
  for (; i + sum_lanes <= n; i += sum_lanes) add_lanes(total, x + i);
  for (int lane = 0; i < n; ++i, ++lane) total[lane] += x[i];
  double result = 0.0;
  for (int lane = 0; lane < sum_lanes; ++lane) result += total[lane];
  return result;
}

}  // namespace pytrain::PT_ISA::core
