// What the tests of the kernels share: counted checks and random numbers that are the same everywhere.
#pragma once

#include <cstdint>
#include <cstdio>

struct Checks {
  int passed = 0, failed = 0;

  void check(bool good, const char* what, double number = 0.0) {
    if (good) {
      ++passed;
    } else if (++failed <= 20) {
      std::printf("FAILED %s (%.9g)\n", what, number);
    }
  }
  int finish() const {
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
  }
};

struct Random {  // xorshift
  uint64_t state = 88172645463325252ull;
  uint64_t bits() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state >> 11;
  }
  double next() { return static_cast<double>(bits()) * 0x1p-53; }
};
