// A step to be taken: segments of random numbers in any storage, each tensor between sentinels.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "core/codec.h"
#include "core/control.h"
#include "core/half.h"
#include "core/segment.h"
#include "cpu/table.h"
#include "rules/all.h"

namespace core = pytrain::PT_ISA::core;
namespace rules = pytrain::PT_ISA::rules;
using pytrain::core::bytes;
using pytrain::core::Extra;
using pytrain::core::Format;
using pytrain::core::Keep;
using pytrain::core::Segment;
using pytrain::core::Storage;

// A tensor between sentinels, `offset` elements off its allocation.
class Buffer {
 public:
  Buffer(Format format, int64_t n, int64_t offset)
      : memory_(2 * guard + (offset + n) * bytes(format), 0xA5), start_(guard + offset * bytes(format)) {}
  void* data() { return memory_.data() + start_; }
  bool operator==(const Buffer& other) const { return memory_ == other.memory_; }

 private:
  static constexpr int64_t guard = 64;
  std::vector<unsigned char> memory_;
  int64_t start_;
};

inline void put(Format format, void* memory, int64_t i, double value) {
  const float narrow = static_cast<float>(value);
  switch (format) {
    case Format::fp32: static_cast<float*>(memory)[i] = narrow; break;
    case Format::fp64: static_cast<double*>(memory)[i] = value; break;
    case Format::bf16: static_cast<core::Bf16*>(memory)[i] = core::encode(narrow, core::Bf16{}); break;
    case Format::fp16: static_cast<core::Fp16*>(memory)[i] = core::encode(narrow, core::Fp16{}); break;
    case Format::s8: static_cast<uint8_t*>(memory)[i] = core::encode_signed(narrow, core::half_unit); break;
    case Format::u8: static_cast<uint8_t*>(memory)[i] = core::encode_unsigned(narrow, core::half_unit); break;
    case Format::i16: static_cast<int16_t*>(memory)[i] = static_cast<int16_t>(65536.0 * (value - 0.5)); break;
    case Format::none: break;
  }
}

inline double get(Format format, const void* memory, int64_t i) {
  switch (format) {
    case Format::fp32: return static_cast<const float*>(memory)[i];
    case Format::fp64: return static_cast<const double*>(memory)[i];
    case Format::bf16: return core::decode(static_cast<const core::Bf16*>(memory)[i]);
    case Format::fp16: return core::decode(static_cast<const core::Fp16*>(memory)[i]);
    default: return 0.0;
  }
}

struct Control {
  pytrain::core::Control head;
  pytrain::core::GroupRow rows[2];
};

inline double hyper_value(const std::string& name, int group) {
  if (name == "lr") return 0.01 + 0.02 * group;
  if (name == "beta1") return 0.9;
  if (name == "beta2") return 0.99;
  if (name == "eps") return 0.05;
  if (name == "weight_decay") return 0.1;
  if (name == "etaplus") return 1.2;
  return name == "step_size_min" ? 1e-3 : name == "warmup_steps" ? 3.0 : 0.5;
}

// As the `positive` and `exact` states of the rules in pytrain/optim.
inline bool positive(const std::string& state) {
  return state.find("_sq") != std::string::npos || state == "sum" || state == "exp_inf" || state == "square_avg" ||
         state == "acc_delta" || state == "step_size";
}
inline bool exact(const std::string& state) { return state == "z" || state == "step_size" || state == "pre_grad"; }

// What a test needs to know of a rule, which is the same for all storage.
struct RuleUnderTest {
  const char* name;
  int index, n_states, n_sums;
  const char* states[pytrain::core::max_states] = {};
  Control control{{0.5, 0.0, 0.0, 0.0, -1.0}, {}};
};

template <class Rule>
RuleUnderTest rule_under_test(int index) {
  RuleUnderTest rule{Rule::name, index, rules::state_count<Rule>(), rules::sum_count<Rule>()};
  if constexpr (rules::state_count<Rule>() > 0) {
    for (int s = 0; s < rule.n_states; ++s) rule.states[s] = Rule::states[s];
  }
  for (int group = 0; group < 2; ++group) {
    pytrain::core::GroupRow& row = rule.control.rows[group];
    row.grad_sign = group ? -1.0 : 1.0;
    row.ema_weight = 0.3;
    row.clip_coef = group ? 0.75 : 1.0;
    for (int h = 0; h < rules::hyper_count<Rule>(); ++h) row.hypers[h] = hyper_value(Rule::hypers[h], group);
  }
  return rule;
}

struct Problem {
  Storage storage;
  std::vector<Buffer> buffers;
  std::vector<Segment> segments;
  std::vector<Extra> extras;
  std::vector<int64_t> offsets, partial_offsets;
  std::vector<double> partials;
  int64_t total = 0;

  Problem(const RuleUnderTest& rule, const Storage& how, const std::vector<int64_t>& counts, int offset)
      : storage(how) {
    Random random;
    for (size_t k = 0; k < counts.size(); ++k) {
      Segment segment{};
      Extra extra{};
      const int64_t n = counts[k];
      segment.param = fill(storage.param, n, offset, [&](int64_t) { return 2.0 * random.next() - 1.0; });
      segment.grad = fill(storage.param, n, offset + 1, [&](int64_t i) {
        return zero_block(i) ? 0.0 : 2.0 * random.next() - 1.0;
      });
      for (int s = 0; s < rule.n_states; ++s) {
        const Format format = storage.states[s];
        const bool above = positive(rule.states[s]);  // and above the square of what has a sign, for a variance
        segment.states[s] = fill(format, n, offset + s, [&](int64_t i) {
          const double value = above ? 0.25 + 0.75 * random.next() : 0.8 * random.next() - 0.4;
          return zero_block(i) ? 0.0 : value;
        });
        if (bytes(format) > 1) continue;
        const int64_t blocks = (n + pytrain::core::code_block - 1) / pytrain::core::code_block;
        extra.scales[s] =
            static_cast<float*>(fill(Format::fp32, blocks, offset, [&](int64_t) { return 0.9 + 0.1 * random.next(); }));
      }
      if (storage.keep == Keep::master) {  // two in three hold
        extra.kept = fill(Format::fp32, n, offset, [&](int64_t i) {
          return get(storage.param, segment.param, i) * (1.0 + (i % 3 ? 1e-4 : 0.1) * random.next());
        });
      } else if (storage.keep == Keep::low_bits) {
        extra.kept = fill(Format::i16, n, offset, [&](int64_t) { return random.next(); });
      } else if (storage.keep == Keep::compensation) {
        extra.kept = fill(storage.param, n, offset, [&](int64_t i) {
          return get(storage.param, segment.param, i) * (random.next() - 0.5) * 0x1p-8;
        });
      }
      const Format wide = storage.param == Format::fp64 ? Format::fp64 : Format::fp32;
      if (storage.ema) extra.ema = fill(wide, n, offset + 2, [&](int64_t) { return random.next(); });
      for (double& scalar : extra.scalars) scalar = 0.5;
      extra.index = 7 * static_cast<int64_t>(k) + 1;
      extra.begin = pytrain::core::random_tile * static_cast<int64_t>(k % 3);  // every third is whole
      extra.whole = n + 2 * extra.begin;
      segment.numel = n;
      segment.group = static_cast<int64_t>(k % 2);
      segment.step = 1.0 + static_cast<double>(k / 2 * 3);
      offsets.push_back(total);
      partial_offsets.push_back(static_cast<int64_t>(partials.size()));
      total += n;
      partials.resize(partials.size() + (n + pytrain::cpu::block - 1) / pytrain::cpu::block * rule.n_sums);
      segments.push_back(segment);
      extras.push_back(extra);
    }
    partials.push_back(sentinel);
  }
  Problem(const Problem&) = delete;

  bool same(const Problem& other) const {
    bool same = buffers == other.buffers && partials.back() == sentinel;
    for (size_t k = 0; k < extras.size(); ++k) {
      same &= !std::memcmp(extras[k].scalars, other.extras[k].scalars, sizeof extras[k].scalars);
    }
    return same;
  }

 private:
  static constexpr double sentinel = -1.0;

  // Elements whose gradient and states are all 0: one block of 8-bit codes.
  static bool zero_block(int64_t i) { return i / 256 == 1; }

  template <class Value>
  void* fill(Format format, int64_t n, int64_t offset, Value value) {
    buffers.emplace_back(format, n, offset % 4);
    void* const memory = buffers.back().data();
    for (int64_t i = 0; i < n; ++i) put(format, memory, i, value(i));
    return memory;
  }
};
