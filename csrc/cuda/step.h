// The kernels of every rule: one launch over all chunks of all parameters, and the launches' table.
#pragma once

#include "cuda/block.h"

namespace pytrain::cuda {

template <class Rule>
PT_DEVICE typename Rule::Hyper hyper_of(const double* numbers) {
  typename Rule::Hyper h;
  double* const fields = reinterpret_cast<double*>(&h);
  for (int i = 0; i < rules::hyper_count<Rule>(); ++i) fields[i] = numbers[i];
  return h;
}

template <class Rule>
constexpr bool is_of_item = rules::scalar_count<Rule>() > 0 || rules::sum_count<Rule>() > 0;

// Keeps a rule in shared memory as long as group and count stay the same, or the item where numbers of its own matter.
template <class Rule>
struct Prepared {
  double* memory;  // shared
  int64_t key = -1;
  double t = 0.0;

  PT_DEVICE Rule get(const Part& part, int64_t item, bool settled) {
    const int64_t wanted = is_of_item<Rule> ? item : part.item.memory.group;
    if (wanted != key || part.t != t) {
      __syncthreads();  // all threads have read the one before
      if (threadIdx.x == 0) make(part, item, settled);
      __syncthreads();
      key = wanted;
      t = part.t;
    }
    return *reinterpret_cast<const Rule*>(memory);
  }

  PT_DEVICE void make(const Part& part, int64_t item, bool settled) const {
    const auto hyper = hyper_of<Rule>(hypers_of(part.job, part.item.memory.group));
    Rule* rule;
    if constexpr (rules::scalar_count<Rule>() > 0) {
      double scalars[core::max_scalars] = {};
      for (int i = 0; i < rules::scalar_count<Rule>(); ++i) scalars[i] = static_cast<double>(*part.item.scalars[i]);
      rule = new (memory) Rule(hyper, part.t, scalars);
    } else {
      rule = new (memory) Rule(hyper, part.t);
    }
    if constexpr (rules::sum_count<Rule>() > 0) {
      if (settled) {
        rule->settle(part.job.totals + item * core::max_sums, static_cast<double>(part.item.memory.numel));
      }
    }
  }
};

// After all blocks have read them: the step counts and the rule's scalars.
template <class Rule>
PT_DEVICE void advance(const Job& job) {
  for (int64_t i = job.first_item + threadIdx.x; i < job.n_items; i += threads) {
    const Item& item = job.items[i];
    const double t = item.count ? static_cast<double>(*item.count) + 1.0 : 1.0;
    if (item.count) *item.count = static_cast<float>(t);
    if constexpr (rules::scalar_count<Rule>() > 0) {
      const auto hyper = hyper_of<Rule>(hypers_of(job, item.memory.group));
      double scalars[core::max_scalars] = {};
      for (int k = 0; k < rules::scalar_count<Rule>(); ++k) scalars[k] = static_cast<double>(*item.scalars[k]);
      if constexpr (rules::sum_count<Rule>() > 0) {
        Rule::advance(hyper, t, scalars, job.totals + i * core::max_sums);
      } else {
        Rule::advance(hyper, t, scalars);
      }
      for (int k = 0; k < rules::scalar_count<Rule>(); ++k) *item.scalars[k] = static_cast<float>(scalars[k]);
    }
  }
}

template <class Rule, class Loop>
PT_KERNEL(threads) update(PT_ARGUMENT(Job) job) {
  static_assert(std::is_trivially_copyable_v<Rule> && sizeof(Rule) % sizeof(double) == 0);
  PT_SHARED(double, memory, sizeof(Rule) / sizeof(double));
  PT_SHARED(unsigned, drawn, 1);
  if (is_skipped(job)) return;
  Prepared<Rule> prepared{memory};
  for (int64_t c = job.first_chunk + blockIdx.x; c < job.n_chunks; c += gridDim.x) {
    const Part part = part_of(job, c);
    const Rule rule = prepared.get(part, job.chunks[c].item, true);
    Loop::update(rule, part);
  }
  if (is_last_block(job.ticket, drawn)) advance<Rule>(job);
}

// The sums over each item that a rule asks for.
template <class Rule, class Loop>
PT_KERNEL(threads) measure(PT_ARGUMENT(Job) job) {
  PT_SHARED(double, memory, sizeof(Rule) / sizeof(double));
  PT_SHARED(double, lines, warps);
  PT_SHARED(unsigned, drawn, 1);
  if (is_skipped(job)) return;
  Prepared<Rule> prepared{memory};
  for (int64_t c = job.first_chunk + blockIdx.x; c < job.n_chunks; c += gridDim.x) {
    const Part part = part_of(job, c);
    const Rule rule = prepared.get(part, job.chunks[c].item, false);
    double sums[core::max_sums] = {};
    Loop::measure(rule, part, sums);
    for (int k = 0; k < rules::sum_count<Rule>(); ++k) {
      const double sum = block_sum(sums[k], lines);
      if (threadIdx.x == 0) job.partials[c * core::max_sums + k] = sum;
    }
  }
  if (!is_last_block(job.ticket, drawn)) return;
  for (int k = 0; k < rules::sum_count<Rule>(); ++k) add_partials(job, k, lines);
}

template <class Rule, class Loop>
const char* launch(bool measuring, const Job& job, unsigned blocks, void* stream) {
  if (!measuring) {
    PT_LAUNCH((update<Rule, Loop>), blocks, threads, stream, job);
    return launch_error();
  }
  if constexpr (rules::sum_count<Rule>() > 0) {
    PT_LAUNCH((measure<Rule, Loop>), blocks, threads, stream, job);
    return launch_error();
  }
  return "this rule takes no sums";
}

// Calls the launch of rule number `rule` of the list.
template <class Loop, class... Rules>
const char* launch_rule(rules::List<Rules...>, int rule, bool measuring, const Job& job, int64_t blocks,
                        void* stream) {
  static constexpr const char* (*table[])(bool, const Job&, unsigned, void*) = {&launch<Rules, Loop>...};
  return table[rule](measuring, job, grid(job, blocks), stream);
}

}  // namespace pytrain::cuda
