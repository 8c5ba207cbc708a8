// bf16 and fp16 to fp32 and back: integer arithmetic and selects only, so that loops over them vectorise everywhere.
#pragma once

#include <cstdint>
#include <cstring>

#include "rules/rule.h"

namespace pytrain::PT_ISA::core {

PT_HD float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

PT_HD uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// All ones where the condition holds, else zero: a select that gcc 12 vectorises on SSE2 too.
PT_HD uint32_t mask(bool condition) {
  return 0u - static_cast<uint32_t>(condition);
}

PT_HD uint32_t select(uint32_t where, uint32_t yes, uint32_t no) {
  return (where & yes) | (~where & no);
}

struct Bf16 {
  uint16_t bits;
};

struct Fp16 {
  uint16_t bits;
};

PT_HD float decode(Bf16 h) {
  return as_float(static_cast<uint32_t>(h.bits) << 16);
}

// Round to nearest, ties to even; a nan stays a (quiet) nan.
PT_HD Bf16 encode(float x, Bf16) {
  const uint32_t u = as_bits(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t is_nan = mask(x != x);
  return Bf16{static_cast<uint16_t>(select(is_nan, (u >> 16) | 0x40u, rounded))};
}

PT_HD float decode(Fp16 h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(h.bits & 0x7fffu);
  // Normal numbers: move the exponent's bias from 15 to 127. Inf and nan: to 255.
  const uint32_t rebiased = (magnitude << 13) + (112u << 23);
  const uint32_t special = mask(magnitude >= 0x7c00u) & (112u << 23);
  // Subnormal numbers are magnitude * 2^-24: put them below the binary point of 2^-14 and take that off again.
  const float subnormal = as_float((magnitude << 13) + (113u << 23)) - as_float(113u << 23);
  const uint32_t bits = select(mask(magnitude < 0x400u), as_bits(subnormal), rebiased + special);
  return as_float(bits | sign);
}

// Round to nearest, ties to even; beyond 65504 + half a unit it is inf; a nan stays a (quiet) nan.
PT_HD Fp16 encode(float x, Fp16) {
  const uint32_t u = as_bits(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the spacing is 2^-24: adding 0.5 lets the adder itself round there.
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
  const uint32_t finite = select(mask(magnitude < (113u << 23)), subnormal, normal);
  const uint32_t infinite = select(mask(magnitude > 0x7f800000u), 0x7e00u | ((magnitude >> 13) & 0x3ffu), 0x7c00u);
  const uint32_t bits = select(mask(magnitude >= 0x477ff000u), infinite, finite);
  return Fp16{static_cast<uint16_t>(bits | sign)};
}

}  // namespace pytrain::PT_ISA::core
