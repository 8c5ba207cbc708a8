// How numbers are kept in fewer bits: 8-bit codes, stochastic rounding, and the two parts of a compensated parameter.
// Integer arithmetic and selects only, as in half.h, so that loops over them vectorise everywhere.
#pragma once

#include <cstdint>

#include "core/half.h"
#include "core/segment.h"

namespace pytrain::PT_ISA::core {

// ---- stochastic rounding: up with the probability of the part that is cut off ---------------------------------------

// random: 16 random bits.
PT_HD Bf16 encode(float x, Bf16, uint32_t random) {
  const uint32_t u = as_bits(x);
  return Bf16{static_cast<uint16_t>(select(mask(x != x), (u >> 16) | 0x40u, (u + random) >> 16))};  // inf stays inf
}

// fp16 cuts off 13 bits of a normal number; below 2^-14 the adder cuts off at 2^-24, from a sum with random bits there.
PT_HD Fp16 encode(float x, Fp16, uint32_t random) {
  const uint32_t u = as_bits(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + (random >> 3)) >> 13;
  // magnitude * 2^24 is below 2^10: in units of 2^-16 it and the random part add up exactly enough.
  const uint32_t units = static_cast<uint32_t>(static_cast<int32_t>(
      as_float(select(mask(magnitude < (113u << 23)), magnitude, 0u)) * 1099511627776.0f));  // 2^40
  const uint32_t subnormal = (units + random) >> 16;
  const uint32_t finite = select(mask(magnitude < (113u << 23)), subnormal, normal);
  const uint32_t infinite = select(mask(magnitude > 0x7f800000u), 0x7e00u | ((magnitude >> 13) & 0x3ffu), 0x7c00u);
  // What is finite and at most 65504 never becomes inf by chance.
  const uint32_t largest = select(mask(finite > 0x7bffu), 0x7bffu, finite);
  const uint32_t bits = select(mask(magnitude >= 0x477ff000u), infinite, largest);
  return Fp16{static_cast<uint16_t>(bits | sign)};
}

// ---- 8-bit codes ----------------------------------------------------------------------------------------------------
// A code is a float with 3 bits of mantissa, relative to the largest magnitude of its block (`scale`, fp32): code c of
// the largest c is 1, and 8 codes below it is half of that. Signed codes have a sign and reach down to 2^-15.75,
// unsigned ones to 2^-31.75: squares need twice the range of what was squared. 0 is 0.

constexpr uint32_t largest_signed = 127, largest_unsigned = 255;

PT_HD float magnitude(uint32_t code, uint32_t largest) {
  const uint32_t bits = (code + (127u << 3) - largest) << 20;
  return as_float(mask(code != 0) & bits);
}

PT_HD float decode_signed(uint8_t code, float scale) {
  const float value = magnitude(code & 0x7fu, largest_signed) * scale;
  return as_float(as_bits(value) | (static_cast<uint32_t>(code & 0x80u) << 24));
}

PT_HD float decode_unsigned(uint8_t code, float scale) { return magnitude(code, largest_unsigned) * scale; }

// bits: of the magnitude relative to the scale, 0 to 1. cut: what is added before 20 bits are cut off: half a unit to
// round to nearest, or random bits. What is below the smallest code gets it, or 0, with `least` as the lowest code.
PT_HD uint32_t code_of(uint32_t bits, uint32_t largest, uint32_t cut, int32_t least) {
  const int32_t code = static_cast<int32_t>((bits + cut) >> 20) - static_cast<int32_t>((127u << 3) - largest);
  const int32_t low = code < least ? least : code;
  return static_cast<uint32_t>(low > static_cast<int32_t>(largest) ? static_cast<int32_t>(largest) : low);
}

constexpr uint32_t half_unit = 1u << 19;

// x: relative to the scale.
PT_HD uint8_t encode_signed(float x, uint32_t cut) {
  const uint32_t u = as_bits(x);
  return static_cast<uint8_t>(((u >> 24) & 0x80u) | code_of(u & 0x7fffffffu, largest_signed, cut, 0));
}

// What is above zero relative to the scale gets a code above zero: a square root of it is divided by.
PT_HD uint8_t encode_unsigned(float x, uint32_t cut) {
  return static_cast<uint8_t>(code_of(as_bits(x), largest_unsigned, cut, static_cast<int32_t>(x > 0.0f)));
}

// ---- a parameter in two parts ---------------------------------------------------------------------------------------

// The fp32 master of a bf16 parameter without the 16 bits that the parameter has. The parameter is the master rounded
// to nearest, ties away from zero, so that these bits suffice: they are a signed distance.
PT_HD float decode_low_bits(Bf16 p, int16_t low) {
  return as_float((static_cast<uint32_t>(p.bits) << 16) + static_cast<uint32_t>(static_cast<int32_t>(low)));
}

PT_HD Bf16 encode_low_bits(float x, int16_t& low) {
  const uint32_t u = as_bits(x);
  const uint32_t special = mask((u & 0x7fffffffu) >= 0x7f800000u);
  const uint32_t quiet = mask((u & 0x7fffffffu) > 0x7f800000u) & 0x40u;
  const uint32_t high = select(special, (u >> 16) | quiet, (u + 0x8000u) >> 16) & 0xffffu;
  low = static_cast<int16_t>(static_cast<uint16_t>(~special & (u - (high << 16))));
  return Bf16{static_cast<uint16_t>(high)};
}

// An fp32 master holds as long as the parameter is what it rounds to; a parameter that was changed from outside counts.
template <class H>
PT_HD float decode_master(H p, float master) {
  return as_float(select(mask(encode(master, H{}).bits == p.bits), as_bits(master), as_bits(decode(p))));
}

// Kahan's compensation: what the last rounding of the parameter added. Kahan 1965 (doi:10.1145/363707.363723).
template <class H>
PT_HD float decode_compensated(H p, H compensation) {
  return decode(p) - decode(compensation);
}

template <class H>
PT_HD H encode_compensated(float x, H& compensation) {
  const H p = encode(x, H{});
  const float added = decode(p) - x;
  const uint32_t finite = mask((as_bits(added) & 0x7fffffffu) < 0x7f800000u);
  compensation = encode(as_float(finite & as_bits(added)), H{});
  return p;
}

}  // namespace pytrain::PT_ISA::core
