// The kinds of storage that the tests of the kernels go through, the plain ones first.
#pragma once

#include "problem.h"

// A kind of storage; `coded` states are s8 or u8 where a rule allows it.
struct Kind {
  const char* name;
  Format param, states;
  bool coded = false;
  Keep keep = Keep::nothing;
  bool ema = false, zero_grad = false, stochastic = false;
  double clip_value = 0.0;
};

constexpr Format fp32 = Format::fp32, fp64 = Format::fp64, bf16 = Format::bf16, fp16 = Format::fp16;
constexpr Kind plain[] = {{"fp32", fp32, fp32}, {"fp64", fp64, fp64}, {"bf16", bf16, bf16}, {"fp16", fp16, fp16}};
constexpr Kind kinds[] = {
    {"fp32", fp32, fp32},
    {"fp64", fp64, fp64},
    {"bf16", bf16, bf16},
    {"fp16", fp16, fp16},
    {"fp32, averaged, gradients zeroed", fp32, fp32, false, Keep::nothing, true, true},
    {"fp64, averaged, gradients zeroed", fp64, fp64, false, Keep::nothing, true, true},
    {"fp16, averaged, gradients zeroed", fp16, fp16, false, Keep::nothing, true, true},
    {"bf16 by chance, averaged", bf16, bf16, false, Keep::nothing, true, false, true},
    {"fp16 by chance, gradients zeroed", fp16, fp16, false, Keep::nothing, false, true, true},
    {"bf16 with a master", bf16, fp32, false, Keep::master},
    {"fp16 with a master, averaged", fp16, fp32, false, Keep::master, true},
    {"bf16 with low bits", bf16, fp32, false, Keep::low_bits},
    {"bf16 with low bits and bf16 states, averaged", bf16, bf16, false, Keep::low_bits, true},
    {"bf16 compensated", bf16, bf16, false, Keep::compensation},
    {"fp16 compensated, averaged", fp16, fp16, false, Keep::compensation, true},
    {"fp32 with bf16 states by chance", fp32, bf16, false, Keep::nothing, false, false, true},
    {"fp32 with codes", fp32, fp32, true},
    {"fp32 with codes by chance, averaged", fp32, fp32, true, Keep::nothing, true, false, true},
    {"bf16 with a master and codes, gradients zeroed", bf16, fp32, true, Keep::master, false, true},
    {"fp32, clamped", fp32, fp32, false, Keep::nothing, false, false, false, 0.2},
    {"fp64, clamped, averaged", fp64, fp64, false, Keep::nothing, true, false, false, 0.2},
    {"fp32 with bf16 states, clamped", fp32, bf16, false, Keep::nothing, false, false, false, 0.2},
    {"fp16 with a master, clamped, averaged", fp16, fp32, false, Keep::master, true, false, false, 0.2},
};

inline Storage storage_of(const Kind& kind, const RuleUnderTest& rule) {
  Storage storage;
  storage.param = kind.param;
  for (int s = 0; s < rule.n_states; ++s) {
    const Format code = positive(rule.states[s]) ? Format::u8 : Format::s8;
    storage.states[s] = kind.coded && !exact(rule.states[s]) ? code : kind.states;
  }
  storage.keep = kind.keep;
  storage.ema = kind.ema;
  storage.ema_by_count = kind.clip_value == 0.0;
  storage.zero_grad = kind.zero_grad;
  storage.stochastic = kind.stochastic;
  storage.seed = 0x123456789abcdefull;
  return storage;
}
