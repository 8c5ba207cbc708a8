// Chunks where something is stored in fewer bits: half precision, 8-bit codes, masters, compensation. A warp takes 256
// elements at a time, one block of codes, so that a code's scale needs no more than the warp; a lane has 4 neighbours
// and the 4 that come 128 later. Every stream is decoded to fp32, goes through the rule, and is encoded.
#pragma once

#include "cuda/block.h"

namespace pytrain::cuda {

struct Mixed {
  static constexpr int width = 4, halves = 2, own = width * halves;  // elements of a lane
  static constexpr int64_t unit = core::code_block;
  static_assert(unit == lanes * own && codec::random_tile % unit == 0);

  // Where a lane's elements are, within the item: those of half h begin at at[h], and count[h] of them exist.
  struct Place {
    int64_t first;  // of the warp's unit
    int64_t at[halves];
    int count[halves];

    PT_DEVICE Place(const Part& part, int64_t unit_start) : first(part.first + unit_start) {
      const int64_t end = part.first + part.n;
      for (int h = 0; h < halves; ++h) {
        at[h] = first + h * lanes * width + int64_t{threadIdx.x % lanes} * width;
        const int64_t left = end - at[h];
        count[h] = static_cast<int>(left < 0 ? 0 : left < width ? left : width);
      }
    }
  };

  // Calls with(element of memory, which of the lane's) for each element, by vectors where they are whole and aligned.
  template <class H, class With>
  static PT_DEVICE void load(const H* from, const Place& at, With with) {
    for (int h = 0; h < halves; ++h) {
      const H* const x = from + at.at[h];
      if (at.count[h] == width && aligned<H, width>(x)) {
        const Vec<H, width> v = *reinterpret_cast<const Vec<H, width>*>(x);
        for (int e = 0; e < width; ++e) with(v.x[e], h * width + e);
      } else {
        for (int e = 0; e < width; ++e) {
          if (e < at.count[h]) with(x[e], h * width + e);
        }
      }
    }
  }

  template <class H, class With>
  static PT_DEVICE void store(H* to, const Place& at, With with) {
    for (int h = 0; h < halves; ++h) {
      H* const x = to + at.at[h];
      if (at.count[h] == width && aligned<H, width>(x)) {
        Vec<H, width> v;
        for (int e = 0; e < width; ++e) v.x[e] = with(h * width + e);
        *reinterpret_cast<Vec<H, width>*>(x) = v;
      } else {
        for (int e = 0; e < width; ++e) {
          if (e < at.count[h]) x[e] = with(h * width + e);
        }
      }
    }
  }

  // ---- random bits --------------------------------------------------------------------------------------------------

  struct Chance {
    uint16_t bits[own];
    uint32_t key;

    PT_DEVICE Chance(const Part& part, const Place& at) : bits{}, key(0) {
      if (!part.job.storage.stochastic) return;
      constexpr int64_t tile = codec::random_tile;
      const codec::RandomTile keys(part.job.storage.seed, part.item.extra.index, part.t, at.first / tile);
      for (int i = 0; i < own; ++i) {
        const uint32_t lane = static_cast<uint32_t>((at.at[i / width] + i % width) % tile);
        const uint32_t word = codec::spread(lane % (tile / 2), keys.keys[0]);
        bits[i] = static_cast<uint16_t>(lane < tile / 2 ? word : word >> 16);
      }
      key = keys.keys[1];
    }
    PT_DEVICE uint32_t key_of_state(int s) const { return codec::spread(static_cast<uint32_t>(s), key); }
  };

  // ---- parameters ---------------------------------------------------------------------------------------------------

  template <class H>
  static PT_DEVICE void decode_param(const Part& part, const Place& at, float* to) {
    H before[own] = {};
    load(static_cast<const H*>(part.item.memory.param), at, [&](H x, int i) { before[i] = x; });
    for (int i = 0; i < own; ++i) to[i] = codec::decode(before[i]);
    const void* const kept = part.item.extra.kept;
    switch (part.job.storage.keep) {
      case Keep::nothing:
        return;
      case Keep::master:
        return load(static_cast<const float*>(kept), at,
                    [&](float x, int i) { to[i] = codec::decode_master(before[i], x); });
      case Keep::compensation:
        return load(static_cast<const H*>(kept), at,
                    [&](H x, int i) { to[i] = codec::decode_compensated(before[i], x); });
      case Keep::low_bits:
        if constexpr (std::is_same_v<H, codec::Bf16>) {
          load(static_cast<const int16_t*>(kept), at,
               [&](int16_t x, int i) { to[i] = codec::decode_low_bits(before[i], x); });
        }
    }
  }

  // Stores the new parameter; leaves in `from` what an average is taken of.
  template <class H>
  static PT_DEVICE void encode_param(const Part& part, const Place& at, float* from, const Chance& chance) {
    H after[own];
    void* const kept = part.item.extra.kept;
    switch (part.job.storage.keep) {
      case Keep::nothing:
        for (int i = 0; i < own; ++i) {
          after[i] = part.job.storage.stochastic ? codec::encode(from[i], H{}, uint32_t{chance.bits[i]})
                                                 : codec::encode(from[i], H{});
          from[i] = codec::decode(after[i]);
        }
        break;
      case Keep::master:
        for (int i = 0; i < own; ++i) after[i] = codec::encode(from[i], H{});
        store(static_cast<float*>(kept), at, [&](int i) { return from[i]; });
        break;
      case Keep::compensation: {
        H lost[own];
        for (int i = 0; i < own; ++i) {
          after[i] = codec::encode_compensated(from[i], lost[i]);
          from[i] = codec::decode_compensated(after[i], lost[i]);
        }
        store(static_cast<H*>(kept), at, [&](int i) { return lost[i]; });
        break;
      }
      case Keep::low_bits:
        if constexpr (std::is_same_v<H, codec::Bf16>) {
          int16_t low[own];
          for (int i = 0; i < own; ++i) after[i] = codec::encode_low_bits(from[i], low[i]);
          store(static_cast<int16_t*>(kept), at, [&](int i) { return low[i]; });
        }
        break;
    }
    store(static_cast<H*>(part.item.memory.param), at, [&](int i) { return after[i]; });
  }

  // ---- states -------------------------------------------------------------------------------------------------------

  static PT_DEVICE void decode_state(const Part& part, int s, const Place& at, float* to) {
    const void* const from = part.item.memory.states[s];
    for (int i = 0; i < own; ++i) to[i] = 0.0f;
    switch (part.job.storage.states[s]) {
      case Format::bf16:
        return load(static_cast<const codec::Bf16*>(from), at, [&](codec::Bf16 x, int i) { to[i] = codec::decode(x); });
      case Format::fp16:
        return load(static_cast<const codec::Fp16*>(from), at, [&](codec::Fp16 x, int i) { to[i] = codec::decode(x); });
      case Format::s8: {
        const float scale = part.item.extra.scales[s][at.first / unit];
        return load(static_cast<const uint8_t*>(from), at,
                    [&](uint8_t x, int i) { to[i] = codec::decode_signed(x, scale); });
      }
      case Format::u8: {
        const float scale = part.item.extra.scales[s][at.first / unit];
        return load(static_cast<const uint8_t*>(from), at,
                    [&](uint8_t x, int i) { to[i] = codec::decode_unsigned(x, scale); });
      }
      default:
        return load(static_cast<const float*>(from), at, [&](float x, int i) { to[i] = x; });
    }
  }

  // The largest magnitude of the warp's unit, as in cpu/tiles.h.
  static PT_DEVICE float scale_of(const Place& at, const float* x) {
    int32_t largest = 0;
    for (int i = 0; i < own; ++i) {
      const int32_t bits = static_cast<int32_t>(codec::as_bits(x[i]) & 0x7fffffffu);
      if (i % width < at.count[i / width]) largest = bits > largest ? bits : largest;
    }
    for (int apart = lanes / 2; apart > 0; apart /= 2) {
      const int32_t other = __shfl_xor_sync(all_lanes, largest, apart);
      largest = other > largest ? other : largest;
    }
    if (largest == 0) return 0.0f;
    constexpr int32_t low = 27 << 23, high = 0x7f7fffff;
    return codec::as_float(static_cast<uint32_t>(largest < low ? low : largest > high ? high : largest));
  }

  template <Format F>
  static PT_DEVICE void encode_codes(const Part& part, int s, const Place& at, const float* from,
                                     const Chance& chance) {
    const float scale = scale_of(at, from);
    const float inverse = 1.0f / scale;
    const bool stochastic = part.job.storage.stochastic;
    const uint32_t key = stochastic ? chance.key_of_state(s) : 0;
    store(static_cast<uint8_t*>(part.item.memory.states[s]), at, [&](int i) {
      const uint32_t cut = stochastic ? uint32_t{codec::mixed(chance.bits[i], key)} << 4 : codec::half_unit;
      if (scale == 0.0f) return uint8_t{0};
      return F == Format::s8 ? codec::encode_signed(from[i] * inverse, cut)
                             : codec::encode_unsigned(from[i] * inverse, cut);
    });
    if (threadIdx.x % lanes == 0) part.item.extra.scales[s][at.first / unit] = scale;
  }

  template <class H>
  static PT_DEVICE void encode_half(const Part& part, int s, const Place& at, const float* from,
                                    const Chance& chance) {
    const bool stochastic = part.job.storage.stochastic;
    const uint32_t key = stochastic ? chance.key_of_state(s) : 0;
    store(static_cast<H*>(part.item.memory.states[s]), at, [&](int i) {
      return stochastic ? codec::encode(from[i], H{}, uint32_t{codec::mixed(chance.bits[i], key)})
                        : codec::encode(from[i], H{});
    });
  }

  static PT_DEVICE void encode_state(const Part& part, int s, const Place& at, const float* from,
                                     const Chance& chance) {
    switch (part.job.storage.states[s]) {
      case Format::bf16:
        return encode_half<codec::Bf16>(part, s, at, from, chance);
      case Format::fp16:
        return encode_half<codec::Fp16>(part, s, at, from, chance);
      case Format::s8:
        return encode_codes<Format::s8>(part, s, at, from, chance);
      case Format::u8:
        return encode_codes<Format::u8>(part, s, at, from, chance);
      default:
        return store(static_cast<float*>(part.item.memory.states[s]), at, [&](int i) { return from[i]; });
    }
  }

  // ---- one unit -----------------------------------------------------------------------------------------------------

  // A lane's fp32 values.
  template <class Rule>
  struct Values {
    static constexpr int n_states = rules::state_count<Rule>();
    float p[own], g[own], s[n_states > 0 ? n_states : 1][own];

    PT_DEVICE Values(const Part& part, const Place& at) : p{}, g{} {
      float raw[own] = {};
      switch (part.job.storage.param) {
        case Format::bf16:
          decode_param<codec::Bf16>(part, at, p);
          load(static_cast<const codec::Bf16*>(part.item.memory.grad), at,
               [&](codec::Bf16 x, int i) { raw[i] = codec::decode(x); });
          break;
        case Format::fp16:
          decode_param<codec::Fp16>(part, at, p);
          load(static_cast<const codec::Fp16*>(part.item.memory.grad), at,
               [&](codec::Fp16 x, int i) { raw[i] = codec::decode(x); });
          break;
        default:
          load(static_cast<const float*>(part.item.memory.param), at, [&](float x, int i) { p[i] = x; });
          load(static_cast<const float*>(part.item.memory.grad), at, [&](float x, int i) { raw[i] = x; });
      }
      const float coef = static_cast<float>(part.coef), limit = static_cast<float>(part.job.settings.clip_value);
      for (int i = 0; i < own; ++i) g[i] = clipped(raw[i], coef, limit);
      for (int k = 0; k < n_states; ++k) decode_state(part, k, at, s[k]);
    }
  };

  template <class Rule, int... I>
  static PT_DEVICE void update_unit(const Rule& rule, const Part& part, const Place& at,
                                    std::integer_sequence<int, I...>) {
    Values<Rule> v(part, at);
    for (int i = 0; i < own; ++i) {
      if constexpr (rules::sum_count<Rule>() > 0) {
        if constexpr (Rule::measure_writes) {
          float terms[rules::sum_count<Rule>()];
          rule.measure(v.p[i], v.g[i], v.s[I][i]..., terms);
        }
      }
      v.p[i] -= rule(v.p[i], v.g[i], v.s[I][i]...);
    }
    const Chance chance(part, at);
    (encode_state(part, I, at, v.s[I], chance), ...);
    switch (part.job.storage.param) {
      case Format::bf16:
        encode_param<codec::Bf16>(part, at, v.p, chance);
        break;
      case Format::fp16:
        encode_param<codec::Fp16>(part, at, v.p, chance);
        break;
      default:
        store(static_cast<float*>(part.item.memory.param), at, [&](int i) { return v.p[i]; });
    }
    if (part.ema_weight != 0.0) {
      const float weight = static_cast<float>(part.ema_weight);
      float* const ema = static_cast<float*>(part.item.extra.ema);
      load(ema, at, [&](float x, int i) { v.p[i] = averaged(x, v.p[i], weight); });
      store(ema, at, [&](int i) { return v.p[i]; });
    }
    if (!part.job.storage.zero_grad) return;
    if (part.job.storage.param == Format::fp32) {
      store(static_cast<float*>(part.item.memory.grad), at, [](int) { return 0.0f; });
    } else {
      store(static_cast<uint16_t*>(part.item.memory.grad), at, [](int) { return uint16_t{0}; });
    }
  }

  template <class Rule, int... I>
  static PT_DEVICE void measure_unit(const Rule& rule, const Part& part, const Place& at, double* sums,
                                     std::integer_sequence<int, I...>) {
    Values<Rule> v(part, at);
    float total[rules::sum_count<Rule>()] = {};
    for (int i = 0; i < own; ++i) {
      float terms[rules::sum_count<Rule>()];
      rule.measure(v.p[i], v.g[i], v.s[I][i]..., terms);
      if (i % width >= at.count[i / width]) continue;
      for (int k = 0; k < rules::sum_count<Rule>(); ++k) total[k] += terms[k];
    }
    for (int k = 0; k < rules::sum_count<Rule>(); ++k) sums[k] += static_cast<double>(total[k]);
  }

  template <class With>
  static PT_DEVICE void each(const Part& part, With with) {
    for (int64_t start = int64_t{threadIdx.x / lanes} * unit; start < part.n; start += warps * unit) {
      with(Place(part, start));
    }
  }

  template <class Rule>
  static PT_DEVICE void update(const Rule& rule, const Part& part) {
    each(part, [&](const Place& at) {
      update_unit(rule, part, at, std::make_integer_sequence<int, rules::state_count<Rule>()>{});
    });
  }

  template <class Rule>
  static PT_DEVICE void measure(const Rule& rule, const Part& part, double* sums) {
    each(part, [&](const Place& at) {
      measure_unit(rule, part, at, sums, std::make_integer_sequence<int, rules::state_count<Rule>()>{});
    });
  }
};

}  // namespace pytrain::cuda
