// The walk over segments and their storage formats on the CPU, the same for all rules: a tile that fits the smallest L1
// is decoded to fp32, goes through the rule, and is encoded. Included once an instruction set, after ahead.h.
#pragma once

namespace pytrain::PT_ISA::cpu {

using pytrain::core::Extra;
using pytrain::core::Format;
using pytrain::core::Keep;
using pytrain::core::Segment;
using pytrain::core::Storage;
using pytrain::cpu::block;
using pytrain::cpu::Job;

static_assert(block % tile == 0 && tile % pytrain::core::code_block == 0);

// ---- one tile of one segment --------------------------------------------------------------------------------------

struct Place {
  const Storage& storage;
  const Segment& segment;
  const Extra* extra;
};

// The random bits of a tile: the parameter's, and those of the state that was asked for last.
struct Chance {
  uint16_t own[tile], of_state[tile];
  uint32_t key;

  void begin(const Place& at, int64_t first) {
    if (!at.storage.stochastic) return;
    const core::RandomTile keys(at.storage.seed, at.extra->index, at.segment.step,
                                (at.extra->begin + first) / tile);
    random_tile(keys.keys[0], own);
    key = keys.keys[1];
  }
  const uint16_t* for_state(int s) {
    mixed_tile(core::spread(static_cast<uint32_t>(s), key), own, of_state);
    return of_state;
  }
};

template <class H>
void decode_param(const Place& at, int64_t first, int64_t n, float* to) {
  const H* const p = static_cast<const H*>(at.segment.param) + first;
  switch (at.storage.keep) {
    case Keep::nothing:
      return decode_tile(p, to, n);
    case Keep::master:
      return decode_master_tile(p, static_cast<const float*>(at.extra->kept) + first, to, n);
    case Keep::compensation:
      return decode_compensated_tile(p, static_cast<const H*>(at.extra->kept) + first, to, n);
    case Keep::low_bits:
      if constexpr (std::is_same_v<H, core::Bf16>) {
        return decode_low_bits_tile(p, static_cast<const int16_t*>(at.extra->kept) + first, to, n);
      }
  }
}

// Stores the new parameter; leaves in `from` what an average is taken of.
template <class H>
void encode_param(const Place& at, int64_t first, int64_t n, float* from, const Chance& chance) {
  H* const p = static_cast<H*>(at.segment.param) + first;
  switch (at.storage.keep) {
    case Keep::nothing:
      if (at.storage.stochastic) {
        encode_tile_by_chance(from, p, chance.own, n);
      } else {
        encode_tile(from, p, n);
      }
      if (at.storage.ema) decode_tile(p, from, n);
      return;
    case Keep::master:
      __builtin_memcpy(static_cast<float*>(at.extra->kept) + first, from, sizeof(float) * n);
      return encode_tile(from, p, n);
    case Keep::compensation: {
      H* const compensation = static_cast<H*>(at.extra->kept) + first;
      encode_compensated_tile(from, p, compensation, n);
      if (at.storage.ema) decode_compensated_tile(p, compensation, from, n);
      return;
    }
    case Keep::low_bits:
      if constexpr (std::is_same_v<H, core::Bf16>) {
        return encode_low_bits_tile(from, p, static_cast<int16_t*>(at.extra->kept) + first, n);
      }
  }
}

template <Format F>
void decode_blocks(const Place& at, int s, int64_t first, int64_t n, float* to) {
  constexpr int64_t width = pytrain::core::code_block;
  const uint8_t* const codes = static_cast<const uint8_t*>(at.segment.states[s]) + first;
  for (int64_t i = 0; i < n; i += width) {
    decode_codes<F>(codes + i, at.extra->scales[s][(first + i) / width], to + i, n - i < width ? n - i : width);
  }
}

template <Format F>
void encode_blocks(const Place& at, int s, int64_t first, int64_t n, const float* from, Chance& chance) {
  constexpr int64_t width = pytrain::core::code_block;
  uint8_t* const codes = static_cast<uint8_t*>(at.segment.states[s]) + first;
  const uint16_t* const random = at.storage.stochastic ? chance.for_state(s) : nullptr;
  for (int64_t i = 0; i < n; i += width) {
    const int64_t m = n - i < width ? n - i : width;
    const float scale = block_scale(from + i, m);
    at.extra->scales[s][(first + i) / width] = scale;
    if (scale == 0.0f) {
      __builtin_memset(codes + i, 0, m);
    } else if (random) {
      encode_codes_by_chance<F>(from + i, scale, codes + i, random + i, m);
    } else {
      encode_codes<F>(from + i, scale, codes + i, m);
    }
  }
}

// Where a state's fp32 values of a tile stand: in memory itself, or in `memory` after decoding.
float* decode_state(const Place& at, int s, int64_t first, int64_t n, float* memory) {
  void* const from = at.segment.states[s];
  switch (at.storage.states[s]) {
    case Format::bf16:
      decode_tile(static_cast<core::Bf16*>(from) + first, memory, n);
      return memory;
    case Format::fp16:
      decode_tile(static_cast<core::Fp16*>(from) + first, memory, n);
      return memory;
    case Format::s8:
      decode_blocks<Format::s8>(at, s, first, n, memory);
      return memory;
    case Format::u8:
      decode_blocks<Format::u8>(at, s, first, n, memory);
      return memory;
    default:
      return static_cast<float*>(from) + first;
  }
}

template <class H>
void encode_half_state(const Place& at, int s, int64_t first, int64_t n, const float* from, Chance& chance) {
  H* const to = static_cast<H*>(at.segment.states[s]) + first;
  if (at.storage.stochastic) {
    encode_tile_by_chance(from, to, chance.for_state(s), n);
  } else {
    encode_tile(from, to, n);
  }
}

void encode_state(const Place& at, int s, int64_t first, int64_t n, const float* from, Chance& chance) {
  switch (at.storage.states[s]) {
    case Format::bf16:
      return encode_half_state<core::Bf16>(at, s, first, n, from, chance);
    case Format::fp16:
      return encode_half_state<core::Fp16>(at, s, first, n, from, chance);
    case Format::s8:
      return encode_blocks<Format::s8>(at, s, first, n, from, chance);
    case Format::u8:
      return encode_blocks<Format::u8>(at, s, first, n, from, chance);
    default:
      return;
  }
}

// The fp32 values of one tile.
struct Tile {
  float p_memory[tile], g_memory[tile], s_memory[pytrain::core::max_states][tile];
  Chance chance;
  float* p;
  const float* g;
  float* states[pytrain::core::max_states];
};

// With `apart` no state is left in memory itself.
void decode(const Place& at, int n_states, int64_t first, int64_t n, Tile& t, bool apart = false) {
  t.p = t.p_memory;
  t.g = t.g_memory;
  switch (at.storage.param) {
    case Format::bf16:
      decode_param<core::Bf16>(at, first, n, t.p);
      decode_tile(static_cast<const core::Bf16*>(at.segment.grad) + first, t.g_memory, n);
      break;
    case Format::fp16:
      decode_param<core::Fp16>(at, first, n, t.p);
      decode_tile(static_cast<const core::Fp16*>(at.segment.grad) + first, t.g_memory, n);
      break;
    default:
      t.p = static_cast<float*>(at.segment.param) + first;
      t.g = static_cast<const float*>(at.segment.grad) + first;
  }
  for (int s = 0; s < n_states; ++s) {
    t.states[s] = decode_state(at, s, first, n, t.s_memory[s]);
    if (!apart || t.states[s] == t.s_memory[s]) continue;
    __builtin_memcpy(t.s_memory[s], t.states[s], sizeof(float) * n);
    t.states[s] = t.s_memory[s];
  }
}

// ---- one segment --------------------------------------------------------------------------------------------------

// What every range of a segment needs to know.
struct Part {
  const Job& job;
  const Segment& segment;
  const Extra* extra;
  double coef, ema_weight;
};

template <class T>
void average(const Part& part, const T* p, int64_t first, int64_t n) {
  if (!part.job.storage.ema || part.ema_weight == 0.0) return;
  average_tile(static_cast<T*>(part.extra->ema) + first, p, T(part.ema_weight), n);
}

void zero_grad(const Part& part, int64_t first, int64_t n) {
  const int64_t size = pytrain::core::bytes(part.job.storage.param);
  if (part.job.storage.zero_grad) __builtin_memset(static_cast<char*>(part.segment.grad) + first * size, 0, n * size);
}

constexpr int64_t stretch = 4 * tile;

// The gradients of up to a stretch and their coefficient: in memory itself, or clamped in `memory`, with their sign.
template <class T>
const T* clipped(const Part& part, const T* g, T* memory, T& coef, int64_t n) {
  const T limit = T(part.job.control->clip_value);
  if (limit == T(0)) return g;
  clamp_tile(g, coef, limit, memory, n);
  coef = T(1);
  return memory;
}

// Parameter and states are stored in T: through memory in one go, or a stretch at a time where something follows.
template <class T, class Update>
void step_direct(const Part& part, Update update, const void* rule, int64_t first, int64_t n) {
  const Storage& storage = part.job.storage;
  const bool in_one_go = !storage.ema && !storage.zero_grad && part.job.control->clip_value == 0.0;
  const int64_t stride = in_one_go ? n : stretch;
  T memory[stretch];
  for (int64_t end = first + n; first < end; first += stride) {
    const int64_t m = end - first < stride ? end - first : stride;
    T* const p = static_cast<T*>(part.segment.param) + first;
    T* states[pytrain::core::max_states];
    for (int s = 0; s < part.job.rule->states; ++s) states[s] = static_cast<T*>(part.segment.states[s]) + first;
    T coef = T(part.coef);
    const T* const g = clipped(part, static_cast<const T*>(part.segment.grad) + first, memory, coef, m);
    update(rule, coef, p, g, states, m);
    average<T>(part, p, first, m);
    zero_grad(part, first, m);
  }
}

void step_tiles(const Part& part, const void* rule, int64_t first, int64_t n) {
  const Place at{part.job.storage, part.segment, part.extra};
  const int n_states = part.job.rule->states;
  Tile t;
  float memory[pytrain::core::max_sums][tile];
  float* const terms[] = {memory[0], memory[1]};
  for (int64_t end = first + n; first < end; first += tile) {
    const int64_t m = end - first < tile ? end - first : tile;
    decode(at, n_states, first, m, t);
    float coef = static_cast<float>(part.coef);
    t.g = clipped(part, t.g, t.g_memory, coef, m);
    if (part.job.rule->measure_writes) part.job.rule->measure32(rule, coef, t.p, t.g, t.states, terms, m);
    part.job.rule->update32(rule, coef, t.p, t.g, t.states, m);
    t.chance.begin(at, first);
    for (int s = 0; s < n_states; ++s) encode_state(at, s, first, m, t.states[s], t.chance);
    if (at.storage.param == Format::bf16) encode_param<core::Bf16>(at, first, m, t.p, t.chance);
    if (at.storage.param == Format::fp16) encode_param<core::Fp16>(at, first, m, t.p, t.chance);
    average<float>(part, t.p, first, m);
    zero_grad(part, first, m);
  }
}

bool stored_as(const Storage& storage, Format format, int n_states) {
  bool same = storage.param == format;
  for (int s = 0; s < n_states; ++s) same &= storage.states[s] == format;
  return same;
}

void step_part(const Part& part, const void* rule, int64_t first, int64_t n) {
  const int n_states = part.job.rule->states;
  if (part.job.storage.param == Format::fp64) {
    step_direct<double>(part, part.job.rule->update64, rule, first, n);
  } else if (stored_as(part.job.storage, Format::fp32, n_states)) {
    step_direct<float>(part, part.job.rule->update32, rule, first, n);
  } else {
    step_tiles(part, rule, first, n);
  }
}

// The sums over one block, in tiles, each tile's added to those before it.
template <class T, class Measure>
void measure_direct(const Part& part, Measure measure, const void* rule, int64_t first, int64_t n, double* sums) {
  T memory[pytrain::core::max_sums][tile], g_memory[tile];
  T* const terms[] = {memory[0], memory[1]};
  for (int64_t end = first + n; first < end; first += tile) {
    const int64_t m = end - first < tile ? end - first : tile;
    T coef = T(part.coef);
    const T* const g = clipped(part, static_cast<const T*>(part.segment.grad) + first, g_memory, coef, m);
    T* states[pytrain::core::max_states];
    for (int s = 0; s < part.job.rule->states; ++s) states[s] = static_cast<T*>(part.segment.states[s]) + first;
    measure(rule, coef, static_cast<T*>(part.segment.param) + first, g, states, terms, m);
    for (int k = 0; k < part.job.rule->sums; ++k) sums[k] += core::sum(terms[k], m);
  }
}

void measure_tiles(const Part& part, const void* rule, int64_t first, int64_t n, double* sums) {
  const Place at{part.job.storage, part.segment, part.extra};
  const int n_states = part.job.rule->states;
  Tile t;
  float memory[pytrain::core::max_sums][tile];
  float* const terms[] = {memory[0], memory[1]};
  for (int64_t end = first + n; first < end; first += tile) {
    const int64_t m = end - first < tile ? end - first : tile;
    // What measure does to the states is done again, from unrounded values, when they are stored.
    decode(at, n_states, first, m, t, part.job.rule->measure_writes);
    float coef = static_cast<float>(part.coef);
    t.g = clipped(part, t.g, t.g_memory, coef, m);
    part.job.rule->measure32(rule, coef, t.p, t.g, t.states, terms, m);
    for (int k = 0; k < part.job.rule->sums; ++k) sums[k] += core::sum(terms[k], m);
  }
}

void measure_part(const Part& part, const void* rule, int64_t first, int64_t n, double* sums) {
  if (part.job.storage.param == Format::fp64) {
    measure_direct<double>(part, part.job.rule->measure64, rule, first, n, sums);
  } else if (stored_as(part.job.storage, Format::fp32, part.job.rule->states)) {
    measure_direct<float>(part, part.job.rule->measure32, rule, first, n, sums);
  } else {
    measure_tiles(part, rule, first, n, sums);
  }
}

// ---- many segments ------------------------------------------------------------------------------------------------

// Calls visit(i, first, n) for every segment's whole blocks that begin in a range of the flattened elements.
template <class AnyJob, class Visit>
void walk(const AnyJob& job, int64_t begin, int64_t end, Visit visit) {
  // The last segment that starts at or before `begin`.
  int64_t low = 0, high = job.n_segments - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (job.offsets[middle] <= begin) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  for (int64_t i = low; i < job.n_segments && job.offsets[i] < end; ++i) {
    const int64_t numel = job.segments[i].numel;
    const auto from_block = [&](int64_t element) {
      const int64_t up = element <= 0 ? 0 : (element + block - 1) / block * block;
      return up < numel ? up : numel;
    };
    const int64_t first = from_block(begin - job.offsets[i]), last = from_block(end - job.offsets[i]);
    if (first < last) visit(i, first, last - first);
  }
}

constexpr int max_prepared = 256;  // bytes of a rule

// Prepares a rule anew only where the group or the count differs from the segment before, or numbers of its own matter.
struct Prepared {
  alignas(16) unsigned char memory[max_prepared];
  int64_t group = -1;
  double step = -1.0;

  void be_for(const Job& job, int64_t i) {
    const Segment& segment = job.segments[i];
    if (segment.group == group && segment.step == step && !job.rule->advance && !job.rule->sums) return;
    group = segment.group;
    step = segment.step;
    job.rule->prepare(job.control->rows()[group], step, job.extras ? job.extras[i].scalars : nullptr, memory);
  }
};

Part part_of(const Job& job, int64_t i) {
  const Segment& segment = job.segments[i];
  const pytrain::core::GroupRow& row = job.control->rows()[segment.group];
  return {job, segment, job.extras ? job.extras + i : nullptr,
          row.grad_sign * job.control->inv_scale * row.clip_coef,
          job.storage.ema_by_count && segment.step <= 1.0 ? 1.0 : row.ema_weight};
}

void step(const Job& job, int64_t begin, int64_t end) {
  Prepared rule;
  walk(job, begin, end, [&](int64_t i, int64_t first, int64_t n) {
    rule.be_for(job, i);
    if (job.rule->sums) job.rule->settle(rule.memory, job.extras[i].sums, static_cast<double>(job.extras[i].whole));
    step_part(part_of(job, i), rule.memory, first, n);
  });
}

void take_sums(const Job& job, int64_t begin, int64_t end) {
  Prepared rule;
  walk(job, begin, end, [&](int64_t i, int64_t first, int64_t n) {
    rule.be_for(job, i);
    const Part part = part_of(job, i);
    double* partial = job.partials + job.partial_offsets[i] + first / block * job.rule->sums;
    for (int64_t last = first + n; first < last; first += block, partial += job.rule->sums) {
      for (int k = 0; k < job.rule->sums; ++k) partial[k] = 0.0;
      measure_part(part, rule.memory, first, last - first < block ? last - first : block, partial);
    }
  });
}

}  // namespace pytrain::PT_ISA::cpu
