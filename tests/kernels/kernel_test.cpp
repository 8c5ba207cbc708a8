// The kernels without torch: the same bits on every instruction set as on the baseline, and not a byte outside.
//
// For each rule, format, count and misalignment two segments of two groups are stepped between sentinels, whole and in
// pieces; each level must give the baseline's bits. The codecs are compared with a slow one made of doubles.
// Arguments: the levels to run besides the baseline (default: all that this machine has); "few" for fewer counts.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/half.h"
#include "cpu/dispatch.h"
#include "rules/all.h"

using namespace pytrain::cpu;  // a test of this namespace
using pytrain::core::Control;
using pytrain::core::Format;
using pytrain::core::Segment;
namespace core = pytrain::PT_ISA::core;
namespace rules = pytrain::PT_ISA::rules;

namespace {

int passed = 0, failed = 0;

void check(bool good, const std::string& what) {
  if (good) {
    ++passed;
  } else if (++failed <= 20) {
    std::printf("FAILED %s\n", what.c_str());
  }
}

struct Random {  // xorshift; the same numbers everywhere
  uint64_t state = 88172645463325252ull;
  double next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<double>(state >> 11) * 0x1p-53;
  }
};

constexpr size_t widths[] = {4, 8, 2, 2};
constexpr size_t guard = 64;

void put(Format format, unsigned char* at, double value) {
  const float narrow = static_cast<float>(value);
  switch (format) {
    case Format::fp32: std::memcpy(at, &narrow, 4); break;
    case Format::fp64: std::memcpy(at, &value, 8); break;
    case Format::bf16: { const auto h = core::encode(narrow, core::Bf16{}); std::memcpy(at, &h, 2); break; }
    case Format::fp16: { const auto h = core::encode(narrow, core::Fp16{}); std::memcpy(at, &h, 2); break; }
    case Format::none: break;
  }
}

// A tensor between sentinels, `offset` elements off its allocation.
struct Buffer {
  std::vector<unsigned char> bytes;
  size_t start;
  Buffer(Format format, int64_t n, int offset, Random& random, bool positive)
      : bytes(2 * guard + 8 * widths[static_cast<int>(format)] + n * widths[static_cast<int>(format)], 0xA5),
        start(guard + offset * widths[static_cast<int>(format)]) {
    for (int64_t i = 0; i < n; ++i) {
      const double value = random.next() * (positive ? 1.0 : 2.0) - (positive ? 0.0 : 1.0);
      put(format, &bytes[start + i * widths[static_cast<int>(format)]], value);
    }
  }
  bool guarded(size_t size) const {
    for (size_t i = 0; i < bytes.size(); ++i) {
      if ((i < start || i >= start + size) && bytes[i] != 0xA5) return false;
    }
    return true;
  }
};

struct Problem {
  std::vector<Buffer> buffers;  // param, grad, states of each segment
  std::vector<Segment> segments;
  std::vector<int64_t> offsets;
  int64_t total = 0;

  Problem(Format format, int n_states, std::vector<int64_t> counts, int offset) {
    Random random;
    for (const int64_t n : counts) {
      for (int b = 0; b < 2 + n_states; ++b) buffers.emplace_back(format, n, (offset + b) % 4, random, b >= 2);
    }
    for (size_t k = 0; k < counts.size(); ++k) {
      Buffer* const own = &buffers[k * (2 + n_states)];
      Segment segment{};
      segment.param = &own[0].bytes[own[0].start];
      segment.grad = &own[1].bytes[own[1].start];
      for (int s = 0; s < n_states; ++s) segment.states[s] = &own[2 + s].bytes[own[2 + s].start];
      segment.numel = counts[k];
      segment.group = static_cast<int64_t>(k % 2);
      segment.step = 1.0 + static_cast<double>(k);
      segments.push_back(segment);
      offsets.push_back(total);
      total += counts[k];
    }
  }
  bool guarded(Format format, int n_states) const {
    for (size_t b = 0; b < buffers.size(); ++b) {
      if (!buffers[b].guarded(segments[b / (2 + n_states)].numel * widths[static_cast<int>(format)])) return false;
    }
    return true;
  }
  bool same(const Problem& other) const {
    for (size_t b = 0; b < buffers.size(); ++b) {
      if (buffers[b].bytes != other.buffers[b].bytes) return false;
    }
    return true;
  }
};

struct Block {
  Control head{0.5, 0.0};
  pytrain::core::GroupRow rows[2];
};

Block make_block() {
  Block block{};
  block.head = {0.5, 0.0};
  for (int g = 0; g < 2; ++g) {
    block.rows[g].grad_sign = g ? -1.0 : 1.0;
    const double hypers[] = {0.01 + 0.02 * g, 0.9, 0.99, 0.05, 0.1};
    std::memcpy(block.rows[g].hypers, hypers, sizeof hypers);
  }
  return block;
}

void step(int rule, Format format, Problem& problem, int64_t pieces) {
  static const Block block = make_block();
  const StepFn kernel = current_kernels().step[rule][static_cast<int>(format)];
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t begin = problem.total * piece / pieces, end = problem.total * (piece + 1) / pieces;
    if (begin < end) {
      const auto n = static_cast<int64_t>(problem.segments.size());
      kernel(problem.segments.data(), problem.offsets.data(), n, &block.head, begin, end);
    }
  }
}

template <class Rule>
void check_rule(int rule, const std::vector<Isa>& levels, bool few) {
  constexpr int n_states = rules::state_count<Rule>();
  for (int f = 0; f < pytrain::core::format_count; ++f) {
    const Format format = static_cast<Format>(f);
    const int before = failed;
    for (int64_t n = 0; n <= 70; n += few ? 7 : 1) {
      for (int offset = 0; offset < 4; ++offset) {
        const std::vector<int64_t> counts = {n, 0, 70 - n, n == 70 && !few ? 5000 : 3};
        const std::string what = std::string(Rule::name) + " format " + std::to_string(f) + " n " + std::to_string(n) +
                                 " offset " + std::to_string(offset);
        Problem whole(format, n_states, counts, offset);
        const Problem untouched(format, n_states, counts, offset);
        set_isa(Isa::baseline);
        step(rule, format, whole, 1);
        check(whole.guarded(format, n_states), what + ": wrote outside");
        check(!whole.same(untouched), what + ": changed nothing");
        for (const Isa level : levels) {
          set_isa(level);
          for (const int64_t pieces : {1, 3}) {
            Problem again(format, n_states, counts, offset);
            step(rule, format, again, pieces);
            const std::string how = std::string(isa_name(level)) + " in " + std::to_string(pieces) + " pieces";
            check(again.same(whole), what + ": " + how + " differs");
          }
        }
      }
    }
    std::printf("%-14s format %d: %s\n", Rule::name, f, failed == before ? "ok" : "FAILED");
  }
}

template <class... Rules>
void check_rules(rules::List<Rules...>, const std::vector<Isa>& levels, bool few) {
  int rule = 0;
  (check_rule<Rules>(rule++, levels, few), ...);
}

// A half type's value by the book: sign, exponent bits, mantissa bits.
double slow_decode(uint32_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = static_cast<int>(bits) & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000u ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) return mantissa ? std::nan("") : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

// Encodes around every value and every middle between neighbours, and compares with the nearer one, ties to even.
template <class H>
void check_codec(const char* name, int exponent_bits, int mantissa_bits) {
  const int before = failed;
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const H h{static_cast<uint16_t>(bits)};
    const double exact = slow_decode(bits, exponent_bits, mantissa_bits);
    const double found = core::decode(h);
    const uint16_t back = core::encode(core::decode(h), H{}).bits;
    if (std::isnan(exact)) {
      check(std::isnan(found) && std::isnan(core::decode(H{back})), std::string(name) + " nan");
      continue;
    }
    check(found == exact && back == bits, std::string(name) + " value " + std::to_string(bits));
    const uint32_t magnitude = bits & 0x7fffu;
    const double next = slow_decode(magnitude + 1, exponent_bits, mantissa_bits);
    if (bits != magnitude || std::isinf(exact)) continue;
    const double top = std::ldexp(1.0, 1 << (exponent_bits - 1));
    const double middle = (exact + (std::isinf(next) ? top : next)) / 2;
    const float at = static_cast<float>(middle);
    if (static_cast<double>(at) != middle) continue;  // below fp32's reach
    const uint32_t even = magnitude & 1u ? magnitude + 1 : magnitude;
    check(core::encode(at, H{}).bits == even, std::string(name) + " tie after " + std::to_string(bits));
    check(core::encode(std::nextafterf(at, 0.0f), H{}).bits == magnitude, std::string(name) + " below the tie");
    check(core::encode(std::nextafterf(at, INFINITY), H{}).bits == magnitude + 1, std::string(name) + " above the tie");
  }
  std::printf("%-14s all values and ties: %s\n", name, failed == before ? "ok" : "FAILED");
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Isa> levels;
  bool few = false, named = false;
  try {
    for (int i = 1; i < argc; ++i) {
      few |= !std::strcmp(argv[i], "few");
      if (!std::strcmp(argv[i], "few")) continue;
      named = true;
      levels.push_back(choose_isa(argv[i]));
    }
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
  for (int level = 0; !named && level < isa_count; ++level) {
    if (isa_supported(static_cast<Isa>(level))) levels.push_back(static_cast<Isa>(level));
  }
  for (const Isa level : levels) std::printf("level %s\n", isa_name(level));
  check_codec<core::Bf16>("bf16", 8, 7);
  check_codec<core::Fp16>("fp16", 5, 10);
  check_rules(rules::All{}, levels, few);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}
