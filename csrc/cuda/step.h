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

// In shared memory: what all threads of a block need to know of the chunk that they are at. One thread finds it out, so
// that the others' registers are free for elements.
template <class Rule, class T>
struct Turn {
  static constexpr int n_numbers = sizeof(Rule) / sizeof(double);
  int64_t c;
  const Item* item;
  int64_t first, n;
  double coef, ema_weight, t;
  int64_t key;                // what the rule was made for: a group, or an item where it has numbers of its own,
  double key_t;               // at this count
  alignas(Rule) unsigned char memory[sizeof(Rule)];  // the rule; of bytes, so that it may be written as what it is
  T numbers[n_numbers];       // and as the loop computes with it

  PT_DEVICE void begin(const Job& job) {
    c = job.first_chunk + blockIdx.x - gridDim.x;
    key = -1;
  }

  PT_DEVICE void next(const Job& job, bool settled) {
    c += gridDim.x;
    if (c >= job.n_chunks) return;
    const Part part = part_of(job, c);
    item = &part.item;
    first = part.first;
    n = part.n;
    coef = part.coef;
    ema_weight = part.ema_weight;
    t = part.t;
    const int64_t index = job.chunks[c].item, wanted = is_of_item<Rule> ? index : part.item.memory.group;
    if (wanted == key && t == key_t) return;
    key = wanted;
    key_t = t;
    make(part, index, settled);
    double wide[n_numbers];
    std::memcpy(wide, memory, sizeof wide);
    for (int i = 0; i < n_numbers; ++i) numbers[i] = static_cast<T>(wide[i]);
  }

  PT_DEVICE void make(const Part& part, int64_t index, bool settled) {
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
        rule->settle(part.job.totals + index * core::max_sums, static_cast<double>(part.item.extra.whole));
      }
    }
  }

  PT_DEVICE Part part(const Job& job) const { return {job, *item, first, n, coef, ema_weight, t}; }

  // A double that the compiler sees come from a float takes one register, and no conversion in the loop: a rule uses
  // its numbers as the type it computes in.
  PT_DEVICE Rule rule() const {
    alignas(Rule) double wide[n_numbers];
    for (int i = 0; i < n_numbers; ++i) wide[i] = static_cast<double>(numbers[i]);
    return *reinterpret_cast<const Rule*>(wide);
  }
};

// Calls with() for each chunk of this block, when `turn` is there.
template <class Turn, class With>
PT_DEVICE void each_turn(const Job& job, bool settled, Turn& turn, With with) {
  if (threadIdx.x == 0) turn.begin(job);
  while (true) {
    __syncthreads();  // all threads are done with the chunk before
    if (threadIdx.x == 0) turn.next(job, settled);
    __syncthreads();
    if (turn.c >= job.n_chunks) return;
    with();
  }
}

// After all blocks have read them: the step counts and the rule's scalars.
template <class Rule, int block>
PT_DEVICE void advance(const Job& job) {
  for (int64_t i = job.first_item + threadIdx.x; i < job.n_items; i += block) {
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

// All that a skipped step writes: zeros where gradients are zeroed in the step. Kept, one inf would poison every later
// one.
PT_DEVICE void forget_gradients(const Job& job) {
  using Word = uint16_t;  // every format of a gradient is a number of them
  constexpr int width = 16 / sizeof(Word);
  if (!job.storage.zero_grad) return;
  const int64_t size = core::bytes(job.storage.param) / static_cast<int64_t>(sizeof(Word));
  for (int64_t c = job.first_chunk + blockIdx.x; c < job.n_chunks; c += gridDim.x) {
    const Chunk at = job.chunks[c];
    const Item& item = job.items[at.item];
    const int64_t left = item.memory.numel - at.first, n = (left < chunk ? left : chunk) * size;
    Word* const to = global(static_cast<Word*>(item.memory.grad)) + at.first * size;
    const int64_t whole = aligned<Word, width>(to) ? n / width * width : 0;
    for (int64_t i = int64_t{threadIdx.x} * width; i < whole; i += int64_t{blockDim.x} * width) {
      *reinterpret_cast<Vec<Word, width>*>(to + i) = Vec<Word, width>{};
    }
    for (int64_t i = whole + threadIdx.x; i < n; i += blockDim.x) to[i] = 0;
  }
}

// The loss scale moves with the step, and with a step that is skipped: pass 1 has found where to.
PT_DEVICE void move_scale(const Job& job) {
  constexpr unsigned n = core::scaler_size;
  if (blockIdx.x != 0 || threadIdx.x >= n || !job.scaler) return;
  reinterpret_cast<float*>(job.scaler)[threadIdx.x] = reinterpret_cast<const float*>(job.moved)[threadIdx.x];
}

template <class Rule, class Loop>
PT_RESIDENT_KERNEL(Traits<Loop>::block, Traits<Loop>::template resident<Rule>) update(PT_ARGUMENT(Job) job) {
  static_assert(std::is_trivially_copyable_v<Rule> && sizeof(Rule) % sizeof(double) == 0);
  using Here = Turn<Rule, typename Traits<Loop>::Number>;
  PT_SHARED(Here, turn, 1);
  PT_SHARED(unsigned, drawn, 1);
  move_scale(job);
  if (is_skipped(job)) return forget_gradients(job);
  each_turn(job, true, *turn, [&] { Loop::update(turn->rule(), turn->part(job)); });
  if (is_last_block(job.ticket, drawn)) advance<Rule, Traits<Loop>::block>(job);
}

// The sums over each item that a rule asks for.
template <class Rule, class Loop>
PT_KERNEL(Traits<Loop>::block) measure(PT_ARGUMENT(Job) job) {
  using Here = Turn<Rule, typename Traits<Loop>::Number>;
  PT_SHARED(Here, turn, 1);
  PT_SHARED(double, lines, warps);
  PT_SHARED(unsigned, drawn, 1);
  if (is_skipped(job)) return;
  each_turn(job, false, *turn, [&] {
    double sums[core::max_sums] = {};
    Loop::measure(turn->rule(), turn->part(job), sums);
    for (int k = 0; k < rules::sum_count<Rule>(); ++k) {
      const double sum = block_sum(sums[k], lines);
      if (threadIdx.x == 0) job.partials[turn->c * core::max_sums + k] = sum;
    }
  });
  if (!is_last_block(job.ticket, drawn)) return;
  for (int k = 0; k < rules::sum_count<Rule>(); ++k) add_partials(job, k, lines);
}

template <class Rule, class Loop>
const char* launch(bool measuring, const Job& job, int64_t multiprocessors, void* stream) {
  constexpr int block = Traits<Loop>::block;
  if (!measuring) {
    static const int64_t resident = resident_blocks(update<Rule, Loop>, block);
    PT_LAUNCH((update<Rule, Loop>), grid(job, multiprocessors * resident), block, stream, job);
    return launch_error();
  }
  if constexpr (rules::sum_count<Rule>() > 0) {
    static const int64_t resident = resident_blocks(measure<Rule, Loop>, block);
    PT_LAUNCH((measure<Rule, Loop>), grid(job, multiprocessors * resident), block, stream, job);
    return launch_error();
  }
  return "this rule takes no sums";
}

// Calls the launch of rule number `rule` of the list.
template <class Loop, class... Rules>
const char* launch_rule(rules::List<Rules...>, int rule, bool measuring, const Job& job,
                        int64_t multiprocessors, void* stream) {
  static constexpr const char* (*table[])(bool, const Job&, int64_t, void*) = {&launch<Rules, Loop>...};
  return table[rule](measuring, job, multiprocessors, stream);
}

}  // namespace pytrain::cuda
