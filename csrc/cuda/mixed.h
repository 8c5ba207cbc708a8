// Chunks where something is stored in fewer bits: half precision, 8-bit codes, masters, compensation. A warp takes 256
// elements at a time, one block of codes, so that a code's scale needs no more than the warp; a lane has 4 neighbours
// and the 4 that come 128 later. Every stream is decoded to fp32 into shared memory, goes through the rule, and is
// encoded from there. A lane sees no element but its own, so that nobody waits.
#pragma once

#include "cuda/block.h"

namespace pytrain::cuda {

struct Mixed {
  static constexpr int block = 128;                                  // threads
  static constexpr int width = 4, halves = 2, own = width * halves;  // elements of a lane
  static constexpr int unit = core::code_block;
  static_assert(unit == lanes * own && codec::random_tile % unit == 0);

  using Row = float[unit];  // of a warp: the numbers of one stream
  template <class Rule>
  static constexpr int rows = 2 + rules::state_count<Rule>();

  // The warp's unit within the item. Lane l has elements i = h * 128 + 4 l + e of it, for h < 2 and e < 4.
  struct Place {
    int64_t first;
    int count;  // how many of the unit's elements exist
    int lane;
  };

  // Calls with(element of memory, where in the unit) for each of the lane's elements, by vectors where all are whole.
  template <class H, class With>
  static PT_DEVICE void load(const H* memory, const Place& at, With with) {
    const H* const from = global(memory) + at.first;
    if (at.count == unit && aligned<H, width>(from)) {
      Vec<H, width> v[halves];
      for (int h = 0; h < halves; ++h) {
        v[h] = *reinterpret_cast<const Vec<H, width>*>(from + h * lanes * width + at.lane * width);
      }
      for (int h = 0; h < halves; ++h) {
        for (int e = 0; e < width; ++e) with(v[h].x[e], h * lanes * width + at.lane * width + e);
      }
      return;
    }
    PT_ROLLED
    for (int k = 0; k < own; ++k) {
      const int i = k / width * lanes * width + at.lane * width + k % width;
      if (i < at.count) with(from[i], i);
    }
  }

  // Stores with(where in the unit) for each of the lane's elements.
  template <class H, class With>
  static PT_DEVICE void store(H* memory, const Place& at, With with) {
    H* const to = global(memory) + at.first;
    if (at.count == unit && aligned<H, width>(to)) {
      for (int h = 0; h < halves; ++h) {
        const int i = h * lanes * width + at.lane * width;
        Vec<H, width> v;
        for (int e = 0; e < width; ++e) v.x[e] = with(i + e);
        *reinterpret_cast<Vec<H, width>*>(to + i) = v;
      }
      return;
    }
    PT_ROLLED
    for (int k = 0; k < own; ++k) {
      const int i = k / width * lanes * width + at.lane * width + k % width;
      if (i < at.count) to[i] = with(i);
    }
  }

  // ---- random bits --------------------------------------------------------------------------------------------------

  struct Chance {
    uint32_t keys[2];
    uint32_t first;  // of the unit, in its tile

    PT_DEVICE Chance(const Part& part, const Place& at) : keys{}, first(0) {
      if (!part.job.storage.stochastic) return;
      constexpr int64_t tile = codec::random_tile;
      const int64_t place = part.item.extra.begin + at.first;
      const codec::RandomTile all(part.job.storage.seed, part.item.extra.index, part.t, place / tile);
      keys[0] = all.keys[0];
      keys[1] = all.keys[1];
      first = static_cast<uint32_t>(place % tile);
    }
    PT_DEVICE uint32_t bits(int i) const {
      constexpr uint32_t half = codec::random_tile / 2;
      const uint32_t lane = first + static_cast<uint32_t>(i), word = codec::spread(lane % half, keys[0]);
      return lane < half ? word & 0xffffu : word >> 16;
    }
    PT_DEVICE uint32_t bits_of_state(int i, uint32_t key) const {
      return codec::mixed(static_cast<uint16_t>(bits(i)), key);
    }
    PT_DEVICE uint32_t key_of_state(int s) const { return codec::spread(static_cast<uint32_t>(s), keys[1]); }
  };

  // ---- parameters ---------------------------------------------------------------------------------------------------

  template <class H>
  static PT_DEVICE H as_half(float bits) {
    return H{static_cast<uint16_t>(codec::as_bits(bits))};
  }
  template <class H>
  static PT_DEVICE float as_row(H x) {
    return codec::as_float(uint32_t{x.bits});
  }

  template <class H>
  static PT_DEVICE void decode_param(const Part& part, const Place& at, float* row) {
    const void* const kept = part.item.extra.kept;
    const Keep keep = part.job.storage.keep;
    load(static_cast<const H*>(part.item.memory.param), at,
         [&](H x, int i) { row[i] = keep == Keep::nothing ? codec::decode(x) : as_row(x); });
    if (keep == Keep::master) {
      load(static_cast<const float*>(kept), at,
           [&](float x, int i) { row[i] = codec::decode_master(as_half<H>(row[i]), x); });
    } else if (keep == Keep::compensation) {
      load(static_cast<const H*>(kept), at,
           [&](H x, int i) { row[i] = codec::decode_compensated(as_half<H>(row[i]), x); });
    } else if (keep == Keep::low_bits) {
      if constexpr (std::is_same_v<H, codec::Bf16>) {
        load(static_cast<const int16_t*>(kept), at,
             [&](int16_t x, int i) { row[i] = codec::decode_low_bits(as_half<H>(row[i]), x); });
      }
    }
  }

  // Stores the new parameter; leaves in `row` what an average is taken of. `spare`: another row.
  template <class H>
  static PT_DEVICE void encode_param(const Part& part, const Place& at, float* row, float* spare,
                                     const Chance& chance) {
    H* const param = static_cast<H*>(part.item.memory.param);
    void* const kept = part.item.extra.kept;
    const bool stochastic = part.job.storage.stochastic;
    switch (part.job.storage.keep) {
      case Keep::nothing:
        return store(param, at, [&](int i) {
          const H after = stochastic ? codec::encode(row[i], H{}, chance.bits(i)) : codec::encode(row[i], H{});
          row[i] = codec::decode(after);
          return after;
        });
      case Keep::master:
        store(static_cast<float*>(kept), at, [&](int i) { return row[i]; });
        return store(param, at, [&](int i) { return codec::encode(row[i], H{}); });
      case Keep::compensation:
        store(param, at, [&](int i) {
          H lost;
          const H after = codec::encode_compensated(row[i], lost);
          row[i] = codec::decode_compensated(after, lost);
          spare[i] = as_row(lost);
          return after;
        });
        return store(static_cast<H*>(kept), at, [&](int i) { return as_half<H>(spare[i]); });
      case Keep::low_bits:
        if constexpr (std::is_same_v<H, codec::Bf16>) {
          store(param, at, [&](int i) {
            int16_t low;
            const H after = codec::encode_low_bits(row[i], low);
            spare[i] = codec::as_float(static_cast<uint16_t>(low));
            return after;
          });
          store(static_cast<int16_t*>(kept), at,
                [&](int i) { return static_cast<int16_t>(static_cast<uint16_t>(codec::as_bits(spare[i]))); });
        }
    }
  }

  // ---- states -------------------------------------------------------------------------------------------------------

  template <class H>
  static PT_DEVICE void decode_half(const void* from, const Place& at, float* row) {
    load(static_cast<const H*>(from), at, [&](H x, int i) { row[i] = codec::decode(x); });
  }

  static PT_OUTLINE void decode_state(const Part& part, int s, const Place& at, float* row) {
    const void* const from = part.item.memory.states[s];
    const Format format = part.job.storage.states[s];
    switch (format) {
      case Format::bf16:
        return decode_half<codec::Bf16>(from, at, row);
      case Format::fp16:
        return decode_half<codec::Fp16>(from, at, row);
      case Format::s8:
      case Format::u8: {
        const float scale = global(part.item.extra.scales[s])[at.first / unit];
        const bool has_sign = format == Format::s8;
        return load(static_cast<const uint8_t*>(from), at, [&](uint8_t x, int i) {
          row[i] = has_sign ? codec::decode_signed(x, scale) : codec::decode_unsigned(x, scale);
        });
      }
      default:
        return load(static_cast<const float*>(from), at, [&](float x, int i) { row[i] = x; });
    }
  }

  // The largest magnitude of the warp's unit, as in cpu/tiles.h. What does not exist is 0 in its row.
  static PT_DEVICE float scale_of(const Place& at, const float* row) {
    int32_t largest = 0;
    for (int k = 0; k < own; ++k) {
      const int i = k / width * lanes * width + at.lane * width + k % width;
      const int32_t bits = static_cast<int32_t>(codec::as_bits(row[i]) & 0x7fffffffu);
      if (i < at.count) largest = bits > largest ? bits : largest;
    }
    for (int apart = lanes / 2; apart > 0; apart /= 2) {
      const int32_t other = __shfl_xor_sync(all_lanes, largest, apart);
      largest = other > largest ? other : largest;
    }
    if (largest == 0) return 0.0f;
    constexpr int32_t low = 27 << 23, high = 0x7f7fffff;
    return codec::as_float(static_cast<uint32_t>(largest < low ? low : largest > high ? high : largest));
  }

  template <class H>
  static PT_DEVICE void encode_half(void* to, const Place& at, const float* row, bool stochastic, uint32_t key,
                                    const Chance& chance) {
    store(static_cast<H*>(to), at, [&](int i) {
      return stochastic ? codec::encode(row[i], H{}, chance.bits_of_state(i, key)) : codec::encode(row[i], H{});
    });
  }

  static PT_OUTLINE void encode_state(const Part& part, int s, const Place& at, const float* row,
                                      const Chance& chance) {
    void* const to = part.item.memory.states[s];
    const Format format = part.job.storage.states[s];
    const bool stochastic = part.job.storage.stochastic;
    const uint32_t key = stochastic ? chance.key_of_state(s) : 0;
    switch (format) {
      case Format::bf16:
        return encode_half<codec::Bf16>(to, at, row, stochastic, key, chance);
      case Format::fp16:
        return encode_half<codec::Fp16>(to, at, row, stochastic, key, chance);
      case Format::s8:
      case Format::u8: {
        const float scale = scale_of(at, row), inverse = 1.0f / scale;
        const bool has_sign = format == Format::s8;
        store(static_cast<uint8_t*>(to), at, [&](int i) {
          if (scale == 0.0f) return uint8_t{0};
          const uint32_t cut = stochastic ? chance.bits_of_state(i, key) << 4 : codec::half_unit;
          const float x = row[i] * inverse;
          return has_sign ? codec::encode_signed(x, cut) : codec::encode_unsigned(x, cut);
        });
        if (at.lane == 0) global(part.item.extra.scales[s])[at.first / unit] = scale;
        return;
      }
      default:
        return store(static_cast<float*>(to), at, [&](int i) { return row[i]; });
    }
  }

  // ---- one unit -----------------------------------------------------------------------------------------------------

  // The parameter into rows[0], the gradient as the rule sees it into rows[1].
  static PT_OUTLINE void decode_both(const Part& part, const Place& at, Row* rows) {
    const float coef = static_cast<float>(part.coef), limit = static_cast<float>(limit_of(part.job));
    const void* const grad = part.item.memory.grad;
    float *const p = rows[0], *const g = rows[1];
    switch (part.job.storage.param) {
      case Format::bf16:
        decode_param<codec::Bf16>(part, at, p);
        return load(static_cast<const codec::Bf16*>(grad), at,
                    [&](codec::Bf16 x, int i) { g[i] = clipped(codec::decode(x), coef, limit); });
      case Format::fp16:
        decode_param<codec::Fp16>(part, at, p);
        return load(static_cast<const codec::Fp16*>(grad), at,
                    [&](codec::Fp16 x, int i) { g[i] = clipped(codec::decode(x), coef, limit); });
      default:
        load(static_cast<const float*>(part.item.memory.param), at, [&](float x, int i) { p[i] = x; });
        load(static_cast<const float*>(grad), at, [&](float x, int i) { g[i] = clipped(x, coef, limit); });
    }
  }

  // The parameter from rows[0], its average, and zeros into the gradient.
  static PT_OUTLINE void encode_rest(const Part& part, const Place& at, Row* rows, const Chance& chance) {
    float *const p = rows[0], *const spare = rows[1];
    switch (part.job.storage.param) {
      case Format::bf16:
        encode_param<codec::Bf16>(part, at, p, spare, chance);
        break;
      case Format::fp16:
        encode_param<codec::Fp16>(part, at, p, spare, chance);
        break;
      default:
        store(static_cast<float*>(part.item.memory.param), at, [&](int i) { return p[i]; });
    }
    if (part.ema_weight != 0.0) {
      const float weight = static_cast<float>(part.ema_weight);
      float* const ema = static_cast<float*>(part.item.extra.ema);
      load(ema, at, [&](float x, int i) { p[i] = averaged(x, p[i], weight); });
      store(ema, at, [&](int i) { return p[i]; });
    }
    if (!part.job.storage.zero_grad) return;
    if (part.job.storage.param == Format::fp32) {
      store(static_cast<float*>(part.item.memory.grad), at, [](int) { return 0.0f; });
    } else {
      store(static_cast<uint16_t*>(part.item.memory.grad), at, [](int) { return uint16_t{0}; });
    }
  }

  // What is not there counts as 0, so that the rule may run over it.
  template <class Rule>
  static PT_DEVICE void decode(const Part& part, const Place& at, Row* rows) {
    if (at.count < unit) {
      PT_ROLLED
      for (int k = 0; k < own; ++k) {
        const int i = k / width * lanes * width + at.lane * width + k % width;
        for (int r = 0; r < Mixed::rows<Rule>; ++r) rows[r][i] = 0.0f;
      }
    }
    decode_both(part, at, rows);
    for (int s = 0; s < rules::state_count<Rule>(); ++s) decode_state(part, s, at, rows[2 + s]);
  }

  template <class Rule, int... I>
  static PT_DEVICE void update_unit(const Rule& rule, const Part& part, const Place& at, Row* rows,
                                    std::integer_sequence<int, I...>) {
    decode<Rule>(part, at, rows);
    PT_ROLLED
    for (int h = 0; h < halves; ++h) {
      for (int e = 0; e < width; ++e) {
        const int i = h * lanes * width + at.lane * width + e;
        if constexpr (rules::sum_count<Rule>() > 0) {
          if constexpr (Rule::measure_writes) {
            float terms[rules::sum_count<Rule>()];
            rule.measure(rows[0][i], rows[1][i], rows[2 + I][i]..., terms);
          }
        }
        rows[0][i] -= rule(rows[0][i], rows[1][i], rows[2 + I][i]...);
      }
    }
    const Chance chance(part, at);
    (encode_state(part, I, at, rows[2 + I], chance), ...);
    encode_rest(part, at, rows, chance);
  }

  template <class Rule, int... I>
  static PT_DEVICE void measure_unit(const Rule& rule, const Part& part, const Place& at, Row* rows, double* sums,
                                     std::integer_sequence<int, I...>) {
    decode<Rule>(part, at, rows);
    PT_ROLLED
    for (int h = 0; h < halves; ++h) {
      float total[rules::sum_count<Rule>()] = {};
      for (int e = 0; e < width; ++e) {
        const int i = h * lanes * width + at.lane * width + e;
        float terms[rules::sum_count<Rule>()];
        rule.measure(rows[0][i], rows[1][i], rows[2 + I][i]..., terms);
        if (i >= at.count) continue;
        for (int k = 0; k < rules::sum_count<Rule>(); ++k) total[k] += terms[k];
      }
      for (int k = 0; k < rules::sum_count<Rule>(); ++k) sums[k] += static_cast<double>(total[k]);
    }
  }

  // Calls with(place, the warp's rows) for each unit of this warp.
  template <class Rule, class With>
  static PT_DEVICE void each(const Part& part, With with) {
    constexpr int n_warps = block / lanes;
    constexpr int n_vectors = Mixed::rows<Rule> * unit / width;  // of a warp
    using Vector = Vec<float, width>;
    PT_SHARED(Vector, tiles, n_warps * n_vectors);
    const int warp = static_cast<int>(threadIdx.x) / lanes, lane = static_cast<int>(threadIdx.x) % lanes;
    Row* const own_rows = reinterpret_cast<Row*>(tiles + warp * n_vectors);
    PT_ROLLED
    for (int64_t start = warp * unit; start < part.n; start += n_warps * unit) {
      const int64_t left = part.n - start;
      with(Place{part.first + start, static_cast<int>(left < unit ? left : unit), lane}, own_rows);
    }
  }

  template <class Rule>
  static PT_DEVICE void update(const Rule& rule, const Part& part) {
    each<Rule>(part, [&](const Place& at, Row* rows) {
      update_unit(rule, part, at, rows, std::make_integer_sequence<int, rules::state_count<Rule>()>{});
    });
  }

  template <class Rule>
  static PT_DEVICE void measure(const Rule& rule, const Part& part, double* sums) {
    each<Rule>(part, [&](const Place& at, Row* rows) {
      measure_unit(rule, part, at, rows, sums, std::make_integer_sequence<int, rules::state_count<Rule>()>{});
    });
  }
};

template <>
struct Traits<Mixed> {
  using Number = float;
  static constexpr int block = Mixed::block;
  template <class Rule>
  static constexpr int resident = rules::state_count<Rule>() <= 2 ? 8 : 6;  // 64 or 80 registers, 16 KiB or more shared
};

}  // namespace pytrain::cuda
