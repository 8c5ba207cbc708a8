// Random bits for stochastic rounding: Philox4x32-10, Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3
// (doi:10.1145/2063384.2063405). A counter-based generator: the bits of an element are a function of the seed, the
// parameter, the stream (the parameter itself or one of its states), the element and the step, and of nothing else.
#pragma once

#include <cstdint>

#include "core/segment.h"
#include "rules/rule.h"

namespace pytrain::PT_ISA::core {

using pytrain::core::random_tile;

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

// The numbers of one tile: Philox gives each of its streams a key, and a hash of 32 bits spreads the first key over the
// elements, 16 bits for each. (Two rounds of multiplication and exclusive or; the constants are those that
// github.com/skeeto/hash-prospector found for it.) Streams of the states come from the parameter's by 16-bit steps.
struct RandomTile {
  uint32_t keys[4];

  PT_HD RandomTile(uint64_t seed, int64_t parameter, double t, int64_t tile)
      : keys{static_cast<uint32_t>(tile), static_cast<uint32_t>(tile >> 32),
             static_cast<uint32_t>(static_cast<int64_t>(t)), static_cast<uint32_t>(parameter)} {
    philox(keys[0], keys[1], keys[2], keys[3], static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  }
};

// 16 bits for element `lane` of a tile in the low half, and for element lane + 256 in the high half.
PT_HD uint32_t spread(uint32_t lane, uint32_t key) {
  uint32_t x = lane * 0x9E3779B9u + key;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// Another 16 bits from 16 bits: one to one, in a way that the key decides.
PT_HD uint16_t mixed(uint16_t bits, uint32_t key) {
  uint16_t x = static_cast<uint16_t>(bits ^ static_cast<uint16_t>(key));
  x = static_cast<uint16_t>(x * 0x9E37u);
  x = static_cast<uint16_t>(x ^ (x >> 7));
  x = static_cast<uint16_t>(x * 0x5CB5u);
  return static_cast<uint16_t>(x ^ static_cast<uint16_t>(key >> 16));
}

}  // namespace pytrain::PT_ISA::core
