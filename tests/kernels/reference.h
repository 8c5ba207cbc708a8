// A step as the storage's contract has it, a tensor at a time and without tiles: what the kernels give, bit for bit.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "core/random.h"
#include "problem.h"

// The random bits of one stream of a tensor: 0 is the parameter's, 1 + s that of state s.
inline std::vector<uint32_t> random_bits(const Storage& storage, const Extra& extra, const Segment& segment,
                                         int stream) {
  std::vector<uint32_t> bits;
  for (int64_t i = extra.begin; i < extra.begin + segment.numel; ++i) {
    const core::RandomTile tile(storage.seed, extra.index, segment.step, i / 512);
    const uint32_t both = core::spread(static_cast<uint32_t>(i % 256), tile.keys[0]);
    const uint32_t own = i % 512 < 256 ? both & 0xffffu : both >> 16;
    const uint32_t key = core::spread(static_cast<uint32_t>(stream - 1), tile.keys[1]);
    bits.push_back(stream == 0 ? own : core::mixed(static_cast<uint16_t>(own), key));
  }
  return bits;
}

template <class H, class T>
void store_half(void* to, const std::vector<T>& x, const std::vector<uint32_t>& random) {
  for (size_t i = 0; i < x.size(); ++i) {
    const float value = static_cast<float>(x[i]);
    static_cast<H*>(to)[i] = random.empty() ? core::encode(value, H{}) : core::encode(value, H{}, random[i]);
  }
}

// Codes and scales, a block of 256 at a time.
template <class T>
void store_codes(bool is_signed, uint8_t* to, float* scales, const std::vector<T>& x,
                 const std::vector<uint32_t>& random) {
  for (size_t begin = 0; begin < x.size(); begin += 256) {
    const size_t end = begin + 256 < x.size() ? begin + 256 : x.size();
    float largest = 0.0f;
    for (size_t i = begin; i < end; ++i) largest = std::max(largest, static_cast<float>(std::fabs(x[i])));
    const float scale = largest == 0.0f ? 0.0f : std::max(largest, 0x1p-100f), inverse = 1.0f / scale;
    scales[begin / 256] = scale;
    for (size_t i = begin; i < end; ++i) {
      const float relative = static_cast<float>(x[i]) * inverse;
      const uint32_t cut = random.empty() ? core::half_unit : random[i] << 4;
      to[i] = scale == 0.0f ? 0 : is_signed ? core::encode_signed(relative, cut) : core::encode_unsigned(relative, cut);
    }
  }
}

template <class T>
std::vector<T> load_state(const Storage& storage, const Segment& segment, const Extra& extra, int s) {
  std::vector<T> x;
  const Format format = storage.states[s];
  for (int64_t i = 0; i < segment.numel; ++i) {
    const uint8_t code = static_cast<const uint8_t*>(segment.states[s])[bytes(format) == 1 ? i : 0];
    if (format == Format::s8) {
      x.push_back(core::decode_signed(code, extra.scales[s][i / 256]));
    } else if (format == Format::u8) {
      x.push_back(core::decode_unsigned(code, extra.scales[s][i / 256]));
    } else {
      x.push_back(static_cast<T>(get(format, segment.states[s], i)));
    }
  }
  return x;
}

template <class T>
void store_state(const Storage& storage, const Segment& segment, const Extra& extra, int s, const std::vector<T>& x) {
  const Format format = storage.states[s];
  std::vector<uint32_t> random;
  if (storage.stochastic) random = random_bits(storage, extra, segment, 1 + s);
  if (format == Format::bf16) store_half<core::Bf16>(segment.states[s], x, random);
  if (format == Format::fp16) store_half<core::Fp16>(segment.states[s], x, random);
  if (bytes(format) == 1) {
    store_codes(format == Format::s8, static_cast<uint8_t*>(segment.states[s]), extra.scales[s], x, random);
  }
  for (size_t i = 0; i < x.size() && bytes(format) > 2; ++i) {
    put(format, segment.states[s], static_cast<int64_t>(i), static_cast<double>(x[i]));
  }
}

template <class H>
float load_low(const Storage& storage, const Segment& segment, const Extra& extra, int64_t i) {
  const H p = static_cast<const H*>(segment.param)[i];
  if constexpr (std::is_same_v<H, core::Bf16>) {
    if (storage.keep == Keep::low_bits) return core::decode_low_bits(p, static_cast<const int16_t*>(extra.kept)[i]);
  }
  if (storage.keep == Keep::master) return core::decode_master(p, static_cast<const float*>(extra.kept)[i]);
  if (storage.keep == Keep::compensation) return core::decode_compensated(p, static_cast<const H*>(extra.kept)[i]);
  return core::decode(p);
}

// Stores one parameter and what is beside it; returns what an average is taken of.
template <class H>
float store_low(const Storage& storage, const Segment& segment, const Extra& extra, int64_t i, float x,
                const std::vector<uint32_t>& random) {
  H& p = static_cast<H*>(segment.param)[i];
  p = random.empty() ? core::encode(x, H{}) : core::encode(x, H{}, random[i]);
  if constexpr (std::is_same_v<H, core::Bf16>) {
    if (storage.keep == Keep::low_bits) {
      p = core::encode_low_bits(x, static_cast<int16_t*>(extra.kept)[i]);
      return x;
    }
  }
  if (storage.keep == Keep::master) return static_cast<float*>(extra.kept)[i] = x;
  if (storage.keep == Keep::compensation) p = core::encode_compensated(x, static_cast<H*>(extra.kept)[i]);
  return load_low<H>(storage, segment, extra, i);
}

// Sums of tiles of 512 in sixteen lanes, then those of each block of 4096, then the blocks'.
template <class T>
double slow_sum(const std::vector<T>& x) {
  const size_t n = x.size();
  double total = 0.0;
  for (size_t block = 0; block < n; block += 4096) {
    double of_block = 0.0;
    for (size_t tile = block; tile < block + 4096 && tile < n; tile += 512) {
      double lanes[16] = {}, of_tile = 0.0;
      for (size_t i = tile; i < tile + 512 && i < n; ++i) lanes[(i - tile) % 16] += static_cast<double>(x[i]);
      for (const double lane : lanes) of_tile += lane;
      of_block += of_tile;
    }
    total += of_block;
  }
  return total;
}

// The sums of the next tensor where kernels add in another order: they serve if they are these, up to a tolerance.
struct GivenSums {
  const double* sums = nullptr;
  double tolerance = 0.0;
  bool apart = false;
};
inline GivenSums given_sums;

// The decoded numbers of a tensor; the gradient with its coefficient.
template <class T>
struct Values {
  std::vector<T> p, g, states[pytrain::core::max_states];
  int64_t whole = 0;
};

// The part of a step that is the rule's own: states are stored after it, whether measuring changes them or not.
template <class Rule, class T, int... I>
void apply(const double* hypers, double step, double* scalars, Values<T>& v, std::integer_sequence<int, I...>) {
  constexpr int n_sums = rules::sum_count<Rule>();
  typename Rule::Hyper hyper;
  std::memcpy(&hyper, hypers, sizeof hyper);
  Rule rule = [&] {
    if constexpr (rules::scalar_count<Rule>() > 0) {
      return Rule(hyper, step, scalars);
    } else {
      return Rule(hyper, step);
    }
  }();
  double sums[pytrain::core::max_sums] = {};
  if constexpr (n_sums > 0) {
    std::vector<T> terms[n_sums];
    for (size_t i = 0; i < v.p.size(); ++i) {
      T term[n_sums];
      rule.measure(v.p[i], v.g[i], v.states[I][i]..., term);
      for (int k = 0; k < n_sums; ++k) terms[k].push_back(term[k]);
    }
    for (int k = 0; k < n_sums; ++k) {
      sums[k] = slow_sum(terms[k]);
      if (!given_sums.sums) continue;
      const double apart = std::fabs(given_sums.sums[k] - sums[k]);
      if (!(apart <= given_sums.tolerance * sums[k])) given_sums.apart = true;
      sums[k] = given_sums.sums[k];
    }
    rule.settle(sums, static_cast<double>(v.whole));
  }
  for (size_t i = 0; i < v.p.size(); ++i) v.p[i] = v.p[i] - rule(v.p[i], v.g[i], v.states[I][i]...);
  if constexpr (rules::scalar_count<Rule>() > 0 && n_sums > 0) {
    Rule::advance(hyper, step, scalars, sums);
  } else if constexpr (rules::scalar_count<Rule>() > 0) {
    Rule::advance(hyper, step, scalars);
  }
}

template <class T>
using Apply = void (*)(const double* hypers, double step, double* scalars, Values<T>& v);

template <class Rule, class T>
void apply_any(const double* hypers, double step, double* scalars, Values<T>& v) {
  apply<Rule, T>(hypers, step, scalars, v, std::make_integer_sequence<int, rules::state_count<Rule>()>{});
}

template <class T>
void reference_segment(const Storage& storage, const Control& control, const Segment& segment, Extra& extra,
                       int n_states, Apply<T> apply) {
  const pytrain::core::GroupRow& row = control.rows[segment.group];
  const T coef = static_cast<T>(row.grad_sign * control.head.inv_scale * row.clip_coef);
  const T limit = static_cast<T>(control.head.clip_value);
  const T weight = static_cast<T>(storage.ema_by_count && segment.step <= 1.0 ? 1.0 : row.ema_weight);
  Values<T> v;
  for (int s = 0; s < n_states; ++s) v.states[s] = load_state<T>(storage, segment, extra, s);
  for (int64_t i = 0; i < segment.numel; ++i) {
    const T g = static_cast<T>(get(storage.param, segment.grad, i)) * coef;
    v.g.push_back(limit > T(0) ? std::max(-limit, std::min(g, limit)) : g);
    v.p.push_back(storage.param == Format::bf16   ? load_low<core::Bf16>(storage, segment, extra, i)
                  : storage.param == Format::fp16 ? load_low<core::Fp16>(storage, segment, extra, i)
                                                  : static_cast<T>(get(storage.param, segment.param, i)));
  }
  v.whole = extra.whole;
  apply(row.hypers, segment.step, extra.scalars, v);
  for (int s = 0; s < n_states; ++s) store_state(storage, segment, extra, s, v.states[s]);
  std::vector<uint32_t> random;
  if (storage.stochastic) random = random_bits(storage, extra, segment, 0);
  for (int64_t i = 0; i < segment.numel; ++i) {
    T& p = v.p[i];
    if (storage.param == Format::bf16) {
      p = store_low<core::Bf16>(storage, segment, extra, i, static_cast<float>(p), random);
    } else if (storage.param == Format::fp16) {
      p = store_low<core::Fp16>(storage, segment, extra, i, static_cast<float>(p), random);
    } else {
      static_cast<T*>(segment.param)[i] = p;
    }
    if (storage.ema) static_cast<T*>(extra.ema)[i] = rules::lerp(static_cast<T*>(extra.ema)[i], p, weight);
    if (storage.zero_grad) put(storage.param, segment.grad, i, 0.0);
  }
}

inline void reference_step(const RuleUnderTest& rule, Apply<float> apply32, Apply<double> apply64, Problem& problem) {
  for (size_t k = 0; k < problem.segments.size(); ++k) {
    const Segment& segment = problem.segments[k];
    if (problem.storage.param == Format::fp64) {
      reference_segment(problem.storage, rule.control, segment, problem.extras[k], rule.n_states, apply64);
    } else {
      reference_segment(problem.storage, rule.control, segment, problem.extras[k], rule.n_states, apply32);
    }
  }
}
