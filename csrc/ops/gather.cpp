// The checks and sums of many small tensors, which begin while the caller still reads where they lie.
#include <algorithm>
#include <atomic>
#include <thread>

#include "cpu/dispatch.h"
#include "ops/table.h"

namespace pytrain::ops {
namespace {

// What a thread takes at once; from how many rows on several do; and how many elements one may add up alone.
constexpr int64_t chunk_rows = 64;
constexpr int64_t few_rows = 2 * chunk_rows;
constexpr int64_t few_elements = 131072;
// Of a chunk with more elements the sums are left to a walk that shares out single blocks.
constexpr int64_t chunk_elements = chunk_rows * cpu::block;
// One thread reads; more than so many would wait for it.
constexpr int64_t most_threads = 4;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until so many pairs are read; false where not all will be.
bool wait_for(const std::atomic<int64_t>& read, int64_t n) {
  for (int64_t looks = 1;; ++looks) {
    const int64_t now = read.load(std::memory_order_acquire);
    if (now < 0) return false;
    if (now >= n) return true;
    if (looks % 1024) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace

int64_t Table::gather(const Pair* pairs, int64_t n, const Gather& reading, const Controls& control, Mode mode) {
  const std::unique_lock<std::mutex> alone(busy_, std::try_to_lock);
  STD_TORCH_CHECK(alone.owns_lock(), info_.name, "_: two threads step the same parameters at once");
  STD_TORCH_CHECK(!launches_ && mode < Mode::settle, info_.name,
                  "_: only fit and stats, on the CPU, begin before all is read");
  check_call(n, {}, control.block);
  fitted_ = nullptr;
  make_room(n);
  std::atomic<int64_t> read{0}, taken{0};
  const bool few = n < few_rows;
  std::atomic<bool> late{!small_ || (few && elements_ > few_elements)};  // the sums come later, all of them
  Misfits misfits(n);
  const auto look = [&] {
    std::vector<double> partials;
    for (int64_t begin; (begin = taken.fetch_add(chunk_rows)) < n;) {
      const int64_t end = std::min(n, begin + chunk_rows);
      for (int64_t k = begin; k < std::min(end, begin + rows_ahead); ++k) call_ahead(k);
      if (!wait_for(read, end) || !fit_rows(pairs, begin, end, {}, misfits)) return;
      if (mode == Mode::fit || late.load(std::memory_order_relaxed)) continue;
      if (!sum_chunk(begin, end, partials)) late = true;
    }
  };
  const int64_t threads = few ? 1 : std::min<int64_t>(most_threads, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    if (begin == 0) reading.run(reading.context, read);  // on the thread that called
    look();
  });
  if (read < n) return not_all;
  if (misfits.first.misfit != Misfit::none) return misfits.first.k;
  for (int64_t k = 0; k < n; ++k) {
    if (staging_[k]) return k;
  }
  note_extents({});
  fitted_ = pairs;
  if (mode == Mode::fit) return applied;
  return late ? run_on_cpu(control.block, Mode::stats) : add_sums(*static_cast<core::Control*>(control.block.data));
}

bool Table::sum_chunk(int64_t begin, int64_t end, std::vector<double>& partials) {
  int64_t offsets[chunk_rows], places[chunk_rows], total = 0, n_partials = 0;
  for (int64_t k = begin; k < end; ++k) {
    if (staging_[k]) return false;  // its gradient does not lie as its parameter does
    offsets[k - begin] = total;
    places[k - begin] = n_partials;
    total += segments_[k].numel;
    n_partials += cpu::blocks_of(segments_[k].numel);
  }
  if (total > chunk_elements) return false;
  partials.resize(n_partials);
  const cpu::Kernels& kernels = cpu::current_kernels();
  kernels.stats({&kernels.rules[rule_], storage_, segments_.data() + begin, nullptr, offsets, end - begin, nullptr,
                 places, partials.data()},
                0, total);
  for (int64_t k = begin; k < end; ++k) {
    block_sums_[k] = cpu::total(partials.data() + places[k - begin], cpu::blocks_of(segments_[k].numel));
  }
  return true;
}

}  // namespace pytrain::ops
