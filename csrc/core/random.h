// Random bits for stochastic rounding: Philox4x32-10, Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3
// (doi:10.1145/2063384.2063405). A counter-based generator: the bits of an element are a function of the seed, the
// parameter, the stream (the parameter itself or one of its states), the element and the step, and of nothing else.
#pragma once

#include <cstdint>

#include "rules/rule.h"

namespace pytrain::PT_ISA::core {

constexpr int64_t random_tile = 512;  // elements that share 64 calls of the generator, 16 bits each
constexpr int64_t random_lanes = random_tile / 8;

PT_HD void philox(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = uint64_t{0xD2511F53u} * a, right = uint64_t{0xCD9E8D57u} * c;
    const uint32_t next_a = static_cast<uint32_t>(right >> 32) ^ b ^ key0;
    const uint32_t next_c = static_cast<uint32_t>(left >> 32) ^ d ^ key1;
    b = static_cast<uint32_t>(right);
    d = static_cast<uint32_t>(left);
    a = next_a;
    c = next_c;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// Which 16 bits element e of a parameter takes: call e % 64 of tile e / 512, and of its 8 halves number e / 64 % 8.
struct RandomStream {
  uint32_t key0, key1, step, which;

  PT_HD RandomStream(uint64_t seed, int64_t parameter, int stream, double t)
      : key0(static_cast<uint32_t>(seed)),
        key1(static_cast<uint32_t>(seed >> 32)),
        step(static_cast<uint32_t>(static_cast<int64_t>(t))),
        which(static_cast<uint32_t>(parameter * 8 + stream)) {}

  PT_HD void call(int64_t number, uint32_t* words) const {
    uint32_t a = static_cast<uint32_t>(number), b = static_cast<uint32_t>(number >> 32), c = step, d = which;
    philox(a, b, c, d, key0, key1);
    words[0] = a;
    words[1] = b;
    words[2] = c;
    words[3] = d;
  }
};

}  // namespace pytrain::PT_ISA::core
