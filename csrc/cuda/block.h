// What all kernels share: vectors of 16 bytes, sums over a thread block in a fixed order, and the last block's turn.
#pragma once

#include "cuda/language.h"

#include <cstdint>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#include "core/codec.h"
#include "core/half.h"
#include "core/random.h"
#include "cuda/job.h"
#include "rules/all.h"

namespace pytrain::cuda {

namespace rules = PT_ISA::rules;
namespace codec = PT_ISA::core;
using core::Format;
using core::Keep;

constexpr int lanes = 32;
constexpr unsigned all_lanes = 0xffffffffu;
constexpr int warps = threads / lanes;  // at most

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T x[N];
};

template <class T, int N>
PT_DEVICE bool aligned(const T* at) {
  return reinterpret_cast<std::uintptr_t>(at) % (sizeof(T) * N) == 0;
}

// What a stored number is worth.
PT_DEVICE double value(double x) { return x; }
PT_DEVICE float value(float x) { return x; }
PT_DEVICE float value(codec::Bf16 x) { return codec::decode(x); }
PT_DEVICE float value(codec::Fp16 x) { return codec::decode(x); }

// Of all threads' values, the same for every thread. `lines` has room for one a warp.
PT_DEVICE double block_sum(double value, double* lines) {
  for (int apart = lanes / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(all_lanes, value, apart);
  __syncthreads();  // the lines of a sum before this one were read
  if (threadIdx.x % lanes == 0) lines[threadIdx.x / lanes] = value;
  __syncthreads();
  double sum = 0.0;
  for (unsigned w = 0; w < blockDim.x / lanes; ++w) sum += lines[w];
  return sum;
}

// True in all threads of the block that is the last to get here: it sees what all others wrote before.
PT_DEVICE bool is_last_block(unsigned* ticket, unsigned* drawn) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *drawn = atomicAdd(ticket, 1u);
  __syncthreads();
  if (*drawn != gridDim.x - 1) return false;
  __threadfence();
  if (threadIdx.x == 0) *ticket = 0;
  return true;
}

// The partial sums number k of each item's chunks, added up into totals[item]; by one block.
PT_DEVICE void add_partials(const Job& job, int k, double* lines) {
  for (int64_t i = job.first_item + threadIdx.x; i < job.n_items; i += blockDim.x) {
    const Item& item = job.items[i];
    if (item.n_chunks > few_chunks) continue;
    double sum = 0.0;
    for (int64_t c = 0; c < item.n_chunks; ++c) sum += job.partials[(item.first_chunk + c) * core::max_sums + k];
    job.totals[i * core::max_sums + k] = sum;
  }
  for (int64_t l = 0; l < job.n_large; ++l) {
    if (job.large[l] < job.first_item || job.large[l] >= job.n_items) continue;
    const Item& item = job.items[job.large[l]];
    double sum = 0.0;
    for (int64_t c = threadIdx.x; c < item.n_chunks; c += blockDim.x) {
      sum += job.partials[(item.first_chunk + c) * core::max_sums + k];
    }
    sum = block_sum(sum, lines);
    if (threadIdx.x == 0) job.totals[job.large[l] * core::max_sums + k] = sum;
  }
  __syncthreads();
}

// What a chunk's loop needs to know besides the tables.
struct Part {
  const Job& job;
  const Item& item;
  int64_t first, n;   // elements of the item
  double coef;        // what multiplies the gradient
  double ema_weight;  // 0: no average is to move
  double t;           // the step count of this update
};

// What a loop over chunks computes in, with how many threads a block, and how many blocks a multiprocessor is to hold
// while it updates by a rule.
template <class Loop>
struct Traits {
  using Number = float;
  static constexpr int block = threads;
  template <class Rule>
  static constexpr int resident = 1;
};

// A number of a param group, from where the launch has it.
PT_DEVICE double setting(const Job& job, int64_t group, double Settings::Row::* given, double core::GroupRow::* kept) {
  return job.settings.n_rows ? job.settings.rows[group].*given : job.control->rows()[group].*kept;
}

// What limits an unscaled gradient's magnitude; 0: nothing.
PT_DEVICE double limit_of(const Job& job) {
  return job.settings.n_rows ? job.settings.clip_value : job.control->clip_value;
}

PT_DEVICE const double* hypers_of(const Job& job, int64_t group) {
  return job.settings.n_rows ? job.settings.rows[group].hypers : job.control->rows()[group].hypers;
}

// Is this step one that another launch has found to be bad?
PT_DEVICE bool is_skipped(const Job& job) { return !job.settings.fresh && job.control->found_inf != 0.0; }

PT_DEVICE Part part_of(const Job& job, int64_t c) {
  const Chunk at = job.chunks[c];
  const Item& item = job.items[at.item];
  const core::Control& control = *job.control;
  const double grad_sign = setting(job, item.memory.group, &Settings::Row::grad_sign, &core::GroupRow::grad_sign);
  const double ema_weight = setting(job, item.memory.group, &Settings::Row::ema_weight, &core::GroupRow::ema_weight);
  const double coef = job.settings.fresh ? job.settings.inv_scale
                                         : control.inv_scale * control.rows()[item.memory.group].clip_coef;
  const int64_t left = item.memory.numel - at.first;
  const double t = item.count ? static_cast<double>(*item.count) + 1.0 : 1.0;
  const bool begins = job.storage.ema_by_count && t <= 1.0;
  const double weight = !job.storage.ema ? 0.0 : begins ? 1.0 : ema_weight;
  return {job, item, at.first, left < chunk ? left : chunk, grad_sign * coef, weight, t};
}

// How many blocks a launch takes: no more than run at a time, since each reads the tables and prepares its rule anew;
// one where there are no elements, which still counts a step.
inline unsigned grid(const Job& job, int64_t blocks) {
  const int64_t n = job.n_chunks - job.first_chunk;
  return static_cast<unsigned>(n < 1 ? 1 : n < blocks ? n : blocks);
}

// The gradient as the rule sees it; limit 0 does not clamp.
template <class T>
PT_DEVICE T clipped(T g, T coef, T limit) {
  const T x = g * coef;
  if (limit == T(0)) return x;
  const T low = x < -limit ? -limit : x;
  return low > limit ? limit : low;
}

template <class T>
PT_DEVICE T averaged(T average, T p, T weight) {
  return weight == T(1) ? p : rules::lerp(average, p, weight);
}

}  // namespace pytrain::cuda
