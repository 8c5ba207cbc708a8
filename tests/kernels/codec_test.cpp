// The codecs, sums and random numbers of csrc/core against slow ones made of doubles, where one can be made.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "check.h"
#include "core/codec.h"
#include "core/half.h"
#include "core/random.h"
#include "core/sum.h"

namespace core = pytrain::PT_ISA::core;

namespace {

Checks checks;

struct Bits {
  int exponent, mantissa;
};
constexpr Bits bits_of(core::Bf16) { return {8, 7}; }
constexpr Bits bits_of(core::Fp16) { return {5, 10}; }

// A half type's value by the book: sign, exponent bits, mantissa bits.
double slow_decode(uint32_t bits, Bits format) {
  const int bias = (1 << (format.exponent - 1)) - 1;
  const int exponent = static_cast<int>(bits >> format.mantissa) & ((1 << format.exponent) - 1);
  const int mantissa = static_cast<int>(bits) & ((1 << format.mantissa) - 1);
  const double sign = bits & 0x8000u ? -1.0 : 1.0;
  if (exponent == (1 << format.exponent) - 1) return mantissa ? std::nan("") : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - format.mantissa);
  return sign * std::ldexp((1 << format.mantissa) + mantissa, exponent - bias - format.mantissa);
}

// What follows the largest number would be, were there one more exponent.
template <class H>
double slow_next(uint32_t magnitude) {
  const double next = slow_decode(magnitude + 1, bits_of(H{}));
  return std::isinf(next) ? std::ldexp(1.0, 1 << (bits_of(H{}).exponent - 1)) : next;
}

// The magnitude that a positive number is cut off to.
template <class H>
uint32_t below(double x) {
  uint32_t low = 0, high = slow_decode(0x7c00u, bits_of(H{})) == INFINITY ? 0x7bffu : 0x7f7fu;
  while (low < high) {
    const uint32_t middle = (low + high + 1) / 2;
    if (slow_decode(middle, bits_of(H{})) <= x) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Encodes around every value and every middle between neighbours, and compares with the nearer one, ties to even.
template <class H>
void check_half(const char* name) {
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const H h{static_cast<uint16_t>(bits)};
    const double exact = slow_decode(bits, bits_of(h));
    const double found = core::decode(h);
    const uint16_t back = core::encode(core::decode(h), H{}).bits;
    if (std::isnan(exact)) {
      checks.check(std::isnan(found) && std::isnan(core::decode(H{back})), name, bits);
      checks.check((back & 0x8000u) == (bits & 0x8000u), name, bits);
      continue;
    }
    checks.check(found == exact && std::signbit(found) == std::signbit(exact) && back == bits, name, bits);
    const uint32_t magnitude = bits & 0x7fffu, sign = bits & 0x8000u;
    if (std::isinf(exact)) continue;
    const double middle = (std::fabs(exact) + slow_next<H>(magnitude)) / 2;
    const float at = static_cast<float>(sign ? -middle : middle);
    if (static_cast<double>(at) != (sign ? -middle : middle)) continue;  // below fp32's reach
    const uint32_t even = (magnitude & 1u ? magnitude + 1 : magnitude) | sign;
    const float past = std::nextafterf(at, sign ? -INFINITY : INFINITY);
    checks.check(core::encode(at, H{}).bits == even, name, bits);
    checks.check(core::encode(std::nextafterf(at, 0.0f), H{}).bits == (magnitude | sign), name, bits);
    checks.check(core::encode(past, H{}).bits == ((magnitude + 1) | sign), name, bits);
  }
  for (const uint32_t nan : {0x7f800001u, 0xff800001u, 0x7fffffffu, 0x7fc00000u, 0xffbfe000u}) {
    const uint32_t quiet = 1u << (bits_of(H{}).mantissa - 1);
    for (const H h : {core::encode(core::as_float(nan), H{}), core::encode(core::as_float(nan), H{}, 0xffffu)}) {
      checks.check(std::isnan(slow_decode(h.bits, bits_of(h))) && (h.bits & quiet), name, nan);
      checks.check(h.bits >> 15 == nan >> 31, name, nan);
      const uint32_t payload = (nan & 0x7fffffu) >> (23 - bits_of(h).mantissa);
      checks.check((h.bits & (2 * quiet - 1)) == (payload | quiet), name, nan);
    }
  }
}

// Whether a number goes up for each of these random values: as often as the part of a unit that is cut off says.
template <class H>
void check_chance(const char* name, float x, const std::vector<uint32_t>& random) {
  const double magnitude = std::fabs(static_cast<double>(x));
  const uint32_t sign = std::signbit(x) ? 0x8000u : 0u, low = below<H>(magnitude);
  const bool fp16 = bits_of(H{}).exponent == 5;
  const double exact = slow_decode(low, bits_of(H{}));
  const uint32_t part = static_cast<uint32_t>((magnitude - exact) / (slow_next<H>(low) - exact) * 65536.0);
  for (const uint32_t r : random) {
    const bool up = part + r >= 65536u && !(fp16 && low == 0x7bffu);  // 65504 does not become inf by chance
    const bool infinite = fp16 && magnitude >= 65520.0;
    const uint32_t expected = infinite ? 0x7c00u : low + up;
    checks.check(core::encode(x, H{}, r).bits == (expected | sign),
                 name, x);
  }
}

// Positive or negative, of any exponent from `least` to `most`.
float any_float(Random& random, int least, int most) {
  const double x = std::ldexp(1.0 + random.next(), least + static_cast<int>(random.bits() % (most - least + 1)));
  return static_cast<float>(random.bits() & 1 ? -x : x);
}

template <class H>
void check_chances(const char* name, int least, int most) {
  Random random;
  std::vector<uint32_t> all(65536);
  for (uint32_t r = 0; r < 65536u; ++r) all[r] = r;
  for (int i = 0; i < 12; ++i) check_chance<H>(name, any_float(random, least, most), all);
  for (int i = 0; i < 20000; ++i) {
    const float x = any_float(random, least, most);
    const uint32_t r = static_cast<uint32_t>(random.bits() & 0xffffu);
    check_chance<H>(name, x, {0u, 1u, 7u, 8u, 0x8000u, r, 65535u});
  }
  for (uint32_t bits = 0; bits < 0x8000u; ++bits) {  // what needs no rounding stays; inf too
    const float x = core::decode(H{static_cast<uint16_t>(bits)});
    if (std::isnan(x)) continue;
    for (const uint32_t r : {0u, 65535u}) {
      const H same = core::encode(-x, H{}, r);
      checks.check(same.bits == (bits | 0x8000u), name, x);
    }
  }
  const float edges[] = {65503.9f, 65504.0f, 65519.996f, 65520.0f, 65535.9f, 1e6f, 0x1p-14f, 0x1.ffffp-15f, 0x1.8p-25f,
                         0x1p-41f, 0x1p-126f, 0.0f, -0.0f};
  for (const float x : edges) check_chance<H>(name, x, {0u, 1u, 0x7fffu, 0x8000u, 65535u});
}

// ---- 8-bit codes ----------------------------------------------------------------------------------------

struct Signed {
  static constexpr int largest = 127;
  static uint8_t encode(float x, uint32_t cut) { return core::encode_signed(x, cut); }
  static float decode(uint8_t code, float scale) { return core::decode_signed(code, scale); }
};
struct Unsigned {
  static constexpr int largest = 255;
  static uint8_t encode(float x, uint32_t cut) { return core::encode_unsigned(x, cut); }
  static float decode(uint8_t code, float scale) { return core::decode_unsigned(code, scale); }
};

// Eight codes an octave; the largest is 1.
double slow_magnitude(int code, int largest) {
  const int steps = code - largest, octave = -((-steps + 7) / 8);
  return code == 0 ? 0.0 : std::ldexp(1.0 + (steps - 8 * octave) / 8.0, octave);
}

// Every code decodes to its value, and that is encoded as this code.
template <class Kind>
void check_values(const char* name) {
  constexpr int largest = Kind::largest;
  checks.check(core::largest_signed == 127 && core::largest_unsigned == 255, name);
  for (const float scale : {1.0f, 0.7f, 0x1p-100f, 1e30f, 3.4e38f}) {
    for (int code = 0; code <= 255; ++code) {
      const bool negative = code > largest;
      const double magnitude = slow_magnitude(negative ? code - 128 : code, largest);
      const float exact = static_cast<float>(magnitude * static_cast<double>(scale));
      const float found = Kind::decode(static_cast<uint8_t>(code), scale);
      checks.check(found == (negative ? -exact : exact) && std::signbit(found) == negative, name);
      checks.check(Kind::encode(found * (1.0f / scale), core::half_unit) == code, name);
    }
  }
}

// The nearest code, the larger of two equally near; by chance up as often as the part of a step that is cut off.
template <class Kind>
void check_rounding(const char* name) {
  constexpr int largest = Kind::largest;
  constexpr bool is_signed = largest == 127;
  std::vector<double> grid;
  for (int code = 0; code <= largest; ++code) grid.push_back(slow_magnitude(code, largest));
  grid[0] = grid[1] - (grid[2] - grid[1]);  // the step below the smallest code, which rounds down to 0
  Random random;
  for (int i = 0; i < 6000; ++i) {
    const int code = i < 200 ? 0 : static_cast<int>(random.bits() % largest);
    const double step = grid[code + 1] - grid[code], where = i % 3 == 0 ? 0.5 : random.next();
    const float x = static_cast<float>(grid[code] + where * step);
    const double part = (static_cast<double>(x) - grid[code]) / step;
    const auto expected = [&](bool up) { return !is_signed && code + up == 0 ? 1 : code + up; };
    checks.check(Kind::encode(x, core::half_unit) == expected(part >= 0.5), name);
    if (is_signed) checks.check(Kind::encode(-x, core::half_unit) == (expected(part >= 0.5) | 0x80), name);
    const uint32_t cut_off = static_cast<uint32_t>(part * 65536.0), r = static_cast<uint32_t>(random.bits() & 0xffffu);
    for (const uint32_t chance : {0u, r, 65535u - cut_off, 65536u - cut_off, 65535u}) {
      if (chance > 65535u) continue;
      checks.check(Kind::encode(x, chance << 4) == expected(cut_off + chance >= 65536u), name);
    }
  }
  for (const double x : {0x1p-149, 0x1p-140, 1e-30, grid[0] * 0.99}) {
    checks.check(Kind::encode(static_cast<float>(x), core::half_unit) == (is_signed ? 0 : 1), name);
    checks.check(Kind::encode(static_cast<float>(x), 0u) == (is_signed ? 0 : 1), name);
  }
  checks.check(Kind::encode(0.0f, core::half_unit) == 0 && Kind::encode(0.0f, 65535u << 4) == 0, name);
  checks.check(Kind::encode(1.0f, 65535u << 4) == largest, name);
  for (const float x : {1.0000002f, 1.2f, 1e9f, INFINITY}) {
    checks.check(Kind::encode(x, core::half_unit) == largest, name);
  }
  for (int i = 1, before = 0; i <= 4000; ++i) {
    const int code = Kind::encode(static_cast<float>(std::ldexp(i, -12)), core::half_unit);
    checks.check(code >= before, name, i);
    before = code;
  }
}

// ---- a parameter in two parts ---------------------------------------------------------------------------

void check_low_bits(bool few) {
  std::vector<uint32_t> patterns;
  for (uint64_t u = 0; u < 0x100000000ull; u += few ? 65521 * 4 : 4099) patterns.push_back(static_cast<uint32_t>(u));
  for (uint32_t high = 0; high < 0x10000u; high += few ? 0x80u : 0x10u) {  // around ties and exact values, and inf
    for (const uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) patterns.push_back(high << 16 | low);
  }
  for (const uint32_t u : patterns) {
    const float x = core::as_float(u);
    int16_t low = 77;
    const core::Bf16 p = core::encode_low_bits(x, low);
    const float back = core::decode_low_bits(p, low), coarse = core::decode(p);
    if (std::isnan(x)) {
      checks.check(std::isnan(back) && std::isnan(coarse) && low == 0, "low bits", u);
      checks.check(std::signbit(x) == std::signbit(coarse), "low bits", u);
      continue;
    }
    checks.check(core::as_bits(back) == u && std::signbit(coarse) == std::signbit(x), "low bits", u);
    if (std::isinf(x) || std::isinf(coarse)) {
      checks.check(std::fabs(x) > 3.39e38f && (std::isfinite(x) || low == 0), "low bits", u);
      continue;
    }
    const uint32_t magnitude = p.bits & 0x7fffu;  // the nearest; of two equally near the larger
    const double here = slow_decode(magnitude, {8, 7}), exact = std::fabs(static_cast<double>(x));
    checks.check(std::fabs(here - exact) < slow_next<core::Bf16>(magnitude) - exact, "low bits", u);
    if (magnitude) checks.check(std::fabs(here - exact) <= exact - slow_decode(magnitude - 1, {8, 7}), "low bits", u);
  }
  for (const uint32_t nan : {0x7f800001u, 0xff800001u, 0x7fffffffu, 0xffffffffu}) {
    int16_t low = 77;
    const core::Bf16 p = core::encode_low_bits(core::as_float(nan), low);
    checks.check(p.bits == ((nan >> 16) | 0x40u) && low == 0, "low bits of a nan");
  }
}

template <class H>
void check_kept(const char* name, int least, int most) {
  Random random;
  for (int i = 0; i < 20000; ++i) {
    const float x = any_float(random, least, most);
    const H p = core::encode(x, H{});
    checks.check(core::decode_master(p, x) == x, name);
    const H other{static_cast<uint16_t>(p.bits + 1)};
    checks.check(core::decode_master(other, x) == core::decode(other), name);
    H compensation{0x1234};
    checks.check(core::encode_compensated(x, compensation).bits == p.bits, name);
    const double added = static_cast<double>(core::decode(p)) - static_cast<double>(x);
    checks.check(compensation.bits == core::encode(static_cast<float>(added), H{}).bits, name);
    const double back = core::decode_compensated(p, compensation), kept = core::decode(compensation);
    checks.check(back == static_cast<float>(static_cast<double>(core::decode(p)) - kept), name);
  }
  H compensation{0x1234};  // what is lost to an inf is not kept
  checks.check(std::isinf(core::decode(core::encode_compensated(3.4e38f, compensation))), name);
  checks.check(compensation.bits == 0, name);
  compensation = H{0x1234};
  checks.check(std::isnan(core::decode(core::encode_compensated(std::nanf(""), compensation))), name);
  checks.check(compensation.bits == 0, name);
  H sum{0}, rest{0};  // a thousand small numbers are not lost beside a large one
  sum = core::encode(1.0f, H{});
  for (int i = 0; i < 1000; ++i) {
    const float next = core::decode_compensated(sum, rest) + 1e-4f;
    sum = core::encode_compensated(next, rest);
  }
  checks.check(std::fabs(core::decode(sum) - 1.1) < 0.01, name);
}

// ---- sums and random numbers ----------------------------------------------------------------------------

template <class T>
void check_sum(const char* name) {
  Random random;
  for (int64_t n = 0; n <= 100; ++n) {
    std::vector<T> x;
    for (int i = 0; i < n; ++i) x.push_back(static_cast<T>(std::ldexp(random.next(), i * 7 % 60)));
    double lanes[16] = {}, total = 0.0;
    for (int64_t i = 0; i < n; ++i) lanes[i % 16] += x[i];
    for (const double lane : lanes) total += lane;
    checks.check(core::sum(x.data(), n) == total, name, static_cast<double>(n));
  }
}

// The words of Random123's file kat_vectors, and where a stream has its seed, parameter, step and element.
void check_random() {
  const uint32_t known[][10] = {
      {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
      {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0x408f276d, 0x41c83b0e, 0xa20bc7c6,
       0x6d5451fd},
      {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420,
       0x24126ea1},
  };
  for (const auto& k : known) {
    uint32_t a = k[0], b = k[1], c = k[2], d = k[3];
    core::philox(a, b, c, d, k[4], k[5]);
    checks.check(a == k[6] && b == k[7] && c == k[8] && d == k[9], "philox");
  }
  const core::RandomTile place(0x123456789abcdef0ull, 1234567, 70000.0, 0x500000003);
  uint32_t a = 3, b = 5, c = 70000, d = 1234567;
  core::philox(a, b, c, d, 0x9abcdef0u, 0x12345678u);
  checks.check(place.keys[0] == a && place.keys[1] == b && place.keys[2] == c && place.keys[3] == d,
               "where a tile of random numbers has its seed, parameter, step and number");
  // As _spread and random_bits of pytrain/optim/storage.py have them.
  const uint32_t spread[][3] = {{0u, 0x00000001u, 0x688990c0u}, {1u, 0x12345678u, 0xd4249895u},
                               {255u, 0xfedcba98u, 0x5c461f97u}, {77u, 0xffffffffu, 0xf787c37eu}};
  for (const auto& k : spread) checks.check(core::spread(k[0], k[1]) == k[2], "spread");
  const uint32_t mixed[][3] = {{0x0000u, 0x00000001u, 0x66c7u}, {0x0001u, 0x12345678u, 0xce98u},
                              {0xffffu, 0xfedcba98u, 0x2ddfu}, {0xabcdu, 0xffff0000u, 0x6266u}};
  for (const auto& k : mixed) {
    checks.check(core::mixed(static_cast<uint16_t>(k[0]), k[1]) == k[2], "mixed");
  }
  std::vector<int> found(65536);
  for (uint32_t bits = 0; bits < 65536u; ++bits) ++found[core::mixed(static_cast<uint16_t>(bits), 0x12345678u)];
  for (const int count : found) checks.check(count == 1, "mixed is not one to one");
  checks.check(core::random_tile == 512, "the tile of random numbers");
}

}  // namespace

int main(int argc, char** argv) {
  const bool few = argc > 1 && !std::strcmp(argv[1], "few");
  check_half<core::Bf16>("bf16");
  check_half<core::Fp16>("fp16");
  check_chances<core::Bf16>("bf16 by chance", -126, 126);
  check_chances<core::Fp16>("fp16 by chance", -42, 15);
  check_values<Signed>("signed codes");
  check_rounding<Signed>("signed codes");
  check_values<Unsigned>("unsigned codes");
  check_rounding<Unsigned>("unsigned codes");
  check_low_bits(few);
  check_kept<core::Bf16>("bf16 in two parts", -100, 120);
  check_kept<core::Fp16>("fp16 in two parts", -20, 14);
  check_sum<float>("sum of floats");
  check_sum<double>("sum of doubles");
  check_random();
  return checks.finish();
}
