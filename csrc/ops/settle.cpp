// Puts what is known between the passes of a step into the words that a launch reads.
#include "ops/settle.h"

#include <algorithm>
#include <cstring>

namespace pytrain::ops {
namespace {

int64_t word(double value) {
  int64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

}  // namespace

int64_t word(const void* address) { return static_cast<int64_t>(reinterpret_cast<std::uintptr_t>(address)); }

int64_t Between::n_rows() const {
  int64_t n = 0;
  for (const Block& block : blocks) n += block.rows;
  return n;
}

void Between::check(const char* op) const {
  STD_TORCH_CHECK(scaled.size() == blocks.size(), op, ": scaled has ", scaled.size(), " entries, controls has ",
                  blocks.size());
  STD_TORCH_CHECK(static_cast<int64_t>(clip_groups.size()) == n_rows(), op, ": clip_groups has ", clip_groups.size(),
                  " entries, expected ", n_rows());
  const auto n_groups = static_cast<int64_t>(max_norms.size());
  for (const int64_t group : clip_groups) {
    STD_TORCH_CHECK(group >= -1 && group < n_groups, op, ": clip_groups has ", group, ", expected -1 to ",
                    n_groups - 1);
  }
}

std::vector<int64_t> Between::words() const {
  std::vector<int64_t> all;
  all.reserve(3 * blocks.size() + clip_groups.size() + max_norms.size());
  for (const Block& block : blocks) all.push_back(word(block.head));
  for (const Block& block : blocks) all.push_back(block.rows);
  all.insert(all.end(), scaled.begin(), scaled.end());
  all.insert(all.end(), clip_groups.begin(), clip_groups.end());
  for (const double limit : max_norms) all.push_back(word(limit));
  return all;
}

void hand_over(Queue& queue, const std::vector<int64_t>& words, cuda::Words& to, Handle& room) {
  to = {};
  to.n = static_cast<int64_t>(words.size());
  if (to.n <= cuda::Words::few) {
    std::copy(words.begin(), words.end(), to.here);
    return;
  }
  room = queue.room(to.n);
  void* const memory = Queue::memory(room);
  queue.upload(words.data(), to.n, memory);
  to.many = static_cast<const int64_t*>(memory);
}

SettleArgument::SettleArgument(Queue& queue, const Between& between) {
  const auto n_groups = static_cast<int64_t>(between.max_norms.size());
  hand_over(queue, between.words(), job.words, words);
  constexpr int64_t moved = (sizeof(core::Scaler) + 7) / 8;
  room = queue.room(2 * n_groups + moved);
  job.scale = between.scale;
  job.n_controls = static_cast<int64_t>(between.blocks.size());
  job.n_rows = between.n_rows();
  job.n_groups = n_groups;
  job.room = static_cast<double*>(Queue::memory(room));
  job.scaler = between.scaler;
  job.moved = reinterpret_cast<core::Scaler*>(job.room + 2 * n_groups);
  job.policy = between.policy;
}

}  // namespace pytrain::ops
