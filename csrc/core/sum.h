// Sums that come out the same for every instruction set: sixteen double lanes, in a fixed order.
#pragma once

#include <cstdint>

#include "rules/rule.h"

namespace pytrain::PT_ISA::core {

constexpr int sum_lanes = 16;

// The sum of n numbers: lane i % 16 takes number i, then the lanes are added from the first to the last.
template <class T>
__attribute__((noinline)) double sum(const T* x, int64_t n) {
  double total[sum_lanes] = {};
  int64_t i = 0;
  for (; i + sum_lanes <= n; i += sum_lanes) {
    for (int lane = 0; lane < sum_lanes; ++lane) total[lane] += static_cast<double>(x[i + lane]);
  }
  for (int lane = 0; i + lane < n; ++lane) total[lane] += static_cast<double>(x[i + lane]);
  double result = 0.0;
  for (int lane = 0; lane < sum_lanes; ++lane) result += total[lane];
  return result;
}

}  // namespace pytrain::PT_ISA::core
