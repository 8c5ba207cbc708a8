// What knows no rule: pass 1, the sums of squares of the gradients, and weight averages outside of a step.
#include "cuda/backend.h"
#include "cuda/block.h"

namespace pytrain::cuda {
namespace {

constexpr int together = 8;  // squares that are added in fp32 before their sum becomes a double

PT_DEVICE float value(float x) { return x; }
PT_DEVICE float value(codec::Bf16 x) { return codec::decode(x); }
PT_DEVICE float value(codec::Fp16 x) { return codec::decode(x); }

// Eight squares in fp32 where no bit of any of them can leave its range; else each in fp64. nan where one is inf or nan.
PT_DEVICE double sum_squares(const float* x, int n) {
  float total = 0.0f;
  for (int i = 0; i < n; ++i) total += x[i] * x[i];
  constexpr float low = 1e-25f, high = 1e38f;  // a square below low / 2^24 does not count beside it
  if (total >= low && total <= high) return static_cast<double>(total);
  double sum = 0.0;
  for (int i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return sum <= std::numeric_limits<double>::max() ? sum : std::numeric_limits<double>::quiet_NaN();
}

// This thread's share of a chunk.
template <class H>
PT_DEVICE double sum_squares_of(const H* g, int64_t n) {
  constexpr int width = 16 / sizeof(H);
  const int64_t whole = aligned<H, width>(g) ? n / width * width : 0;
  double sum = 0.0;
  // `together` elements in as many loads of 16 bytes as they take, each of them side by side with the other threads'.
  constexpr int loads = together / width > 0 ? together / width : 1;
  for (int64_t i = int64_t{threadIdx.x} * width; i < whole; i += threads * width * loads) {
    float x[loads * width] = {};
    for (int l = 0; l < loads; ++l) {
      const int64_t at = i + int64_t{l} * threads * width;
      if (at >= whole) break;
      const Vec<H, width> v = *reinterpret_cast<const Vec<H, width>*>(g + at);
      for (int e = 0; e < width; ++e) x[l * width + e] = value(v.x[e]);
    }
    sum += sum_squares(x, loads * width);
  }
  for (int64_t i = whole + threadIdx.x; i < n; i += threads) {
    const float x = value(g[i]);
    sum += sum_squares(&x, 1);
  }
  return sum;
}

PT_DEVICE double sum_squares_of(const double* g, int64_t n) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < n; i += threads) {
    const bool finite = g[i] * 0.0 == 0.0;  // a finite number's square may be inf
    sum += finite ? g[i] * g[i] : std::numeric_limits<double>::quiet_NaN();
  }
  return sum;
}

PT_DEVICE double stats_of(const Job& job, const Chunk& at) {
  const Item& item = job.items[at.item];
  const int64_t left = item.memory.numel - at.first, n = left < chunk ? left : chunk;
  switch (job.storage.param) {
    case Format::fp64:
      return sum_squares_of(static_cast<const double*>(item.memory.grad) + at.first, n);
    case Format::bf16:
      return sum_squares_of(static_cast<const codec::Bf16*>(item.memory.grad) + at.first, n);
    case Format::fp16:
      return sum_squares_of(static_cast<const codec::Fp16*>(item.memory.grad) + at.first, n);
    default:
      return sum_squares_of(static_cast<const float*>(item.memory.grad) + at.first, n);
  }
}

// The control block of a step that nothing was found out about yet, as pytrain/optim/plan.py begins one.
PT_DEVICE void begin(const Job& job) {
  if (threadIdx.x == 0) *job.control = {job.settings.inv_scale, 0.0, job.settings.clip_value, 0.0, -1.0};
  for (int64_t row = threadIdx.x; row < job.n_rows; row += threads) {
    core::GroupRow& to = job.control->rows()[row];
    to.clip_coef = 1.0;
    to.sumsq = 0.0;
  }
  __syncthreads();
}

// The items' sums into the control block, beside what other tables of the same step have found.
PT_DEVICE void settle_stats(const Job& job, double* lines, unsigned long long* first_bad) {
  if (job.settings.fresh) begin(job);
  add_partials(job, 0, lines);
  constexpr unsigned long long none = ~0ull;
  if (threadIdx.x == 0) *first_bad = none;
  __syncthreads();
  for (int64_t row = 0; row < job.n_rows; ++row) {
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < job.n_items; i += threads) {
      if (job.items[i].memory.group != row) continue;
      const double total = job.totals[i * core::max_sums];
      if (total == total) {
        sum += total;
      } else {
        atomicMin(first_bad, static_cast<unsigned long long>(job.items[i].extra.index));
      }
    }
    sum = block_sum(sum, lines);
    if (threadIdx.x == 0) job.control->rows()[row].sumsq += sum;
  }
  __syncthreads();
  if (threadIdx.x != 0 || *first_bad == none) return;
  const double bad = static_cast<double>(*first_bad), before = job.control->first_bad;
  job.control->found_inf = 1.0;
  job.control->first_bad = before < 0.0 || bad < before ? bad : before;
}

PT_KERNEL(threads) take_stats(PT_ARGUMENT(Job) job) {
  PT_SHARED(double, lines, warps);
  PT_SHARED(unsigned, drawn, 1);
  PT_SHARED(unsigned long long, first_bad, 1);
  for (int64_t c = job.first_chunk + blockIdx.x; c < job.n_chunks; c += gridDim.x) {
    const double sum = block_sum(stats_of(job, job.chunks[c]), lines);
    if (threadIdx.x == 0) job.partials[c * core::max_sums] = sum;
  }
  if (is_last_block(job.ticket, drawn)) settle_stats(job, lines, first_bad);
}

template <class T, class H>
PT_DEVICE void average_chunk(T* average, const H* p, T weight, int64_t n) {
  for (int64_t i = threadIdx.x; i < n; i += threads) {
    if constexpr (std::is_same_v<T, double>) {
      average[i] = averaged(average[i], p[i], weight);
    } else {
      average[i] = averaged(average[i], value(p[i]), weight);
    }
  }
}

PT_KERNEL(threads) average(PT_ARGUMENT(Job) job) {
  const float weight = static_cast<float>(job.weight);
  for (int64_t c = job.first_chunk + blockIdx.x; c < job.n_chunks; c += gridDim.x) {
    const Chunk at = job.chunks[c];
    const Item& item = job.items[at.item];
    const int64_t left = item.memory.numel - at.first, n = left < chunk ? left : chunk;
    const void* const p = item.memory.param;
    float* const to = static_cast<float*>(item.extra.ema) + at.first;
    switch (job.storage.param) {
      case Format::fp64:
        average_chunk(static_cast<double*>(item.extra.ema) + at.first, static_cast<const double*>(p) + at.first,
                      job.weight, n);
        break;
      case Format::bf16:
        average_chunk(to, static_cast<const codec::Bf16*>(p) + at.first, weight, n);
        break;
      case Format::fp16:
        average_chunk(to, static_cast<const codec::Fp16*>(p) + at.first, weight, n);
        break;
      default:
        average_chunk(to, static_cast<const float*>(p) + at.first, weight, n);
    }
  }
}

}  // namespace

const char* launch_stats(const Job& job, int64_t blocks, void* stream) {
  PT_LAUNCH(take_stats, grid(job, blocks), threads, stream, job);
  return launch_error();
}

const char* launch_average(const Job& job, int64_t blocks, void* stream) {
  PT_LAUNCH(average, grid(job, blocks), threads, stream, job);
  return launch_error();
}

}  // namespace pytrain::cuda
