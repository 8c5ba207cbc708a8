// What knows no rule: pass 1, the sums of squares of the gradients, and weight averages outside of a step.
#include "cuda/backend.h"
#include "cuda/block.h"
#include "cuda/settle.h"

namespace pytrain::cuda {
namespace {

// A sum of squares as an unevaluated sum of two floats, of twice their bits: GPUs have few units for fp64.
struct Squares {
  float high = 0.0f, low = 0.0f;

  PT_DEVICE void add(float x) {
    const float square = x * x;
    const float rest = fmaf(x, x, -square);  // exactly what the square's rounding has left out
    const float sum = high + square;
    const float part = sum - high;
    low += ((high - (sum - part)) + (square - part)) + rest;
    high = sum;
  }
  // Beyond these limits squares or rests have left fp32's range; between them 16 squares are good to 2^-44.
  PT_DEVICE bool holds() const { return high >= 1e-30f && high <= 1e38f; }
  PT_DEVICE double value() const { return static_cast<double>(high) + static_cast<double>(low); }
};

// This thread's share of a chunk: calls with(element) for each.
template <class H, class With>
PT_DEVICE void each(const H* g, int64_t n, With with) {
  constexpr int width = 16 / sizeof(H);
  const int64_t whole = aligned<H, width>(g) ? n / width * width : 0;
  for (int64_t i = int64_t{threadIdx.x} * width; i < whole; i += threads * width) {
    const Vec<H, width> v = *reinterpret_cast<const Vec<H, width>*>(g + i);
    for (int e = 0; e < width; ++e) with(value(v.x[e]));
  }
  for (int64_t i = whole + threadIdx.x; i < n; i += threads) with(value(g[i]));
}

// nan where one is inf or nan.
template <class H>
PT_DEVICE double sum_squares_of(const H* g, int64_t n) {
  Squares squares;
  each(g, n, [&](float x) { squares.add(x); });
  if (squares.holds()) return squares.value();
  double sum = 0.0;
  each(g, n, [&](float x) { sum += static_cast<double>(x) * static_cast<double>(x); });
  return sum <= std::numeric_limits<double>::max() ? sum : std::numeric_limits<double>::quiet_NaN();
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
      return sum_squares_of(global(static_cast<const double*>(item.memory.grad)) + at.first, n);
    case Format::bf16:
      return sum_squares_of(global(static_cast<const codec::Bf16*>(item.memory.grad)) + at.first, n);
    case Format::fp16:
      return sum_squares_of(global(static_cast<const codec::Fp16*>(item.memory.grad)) + at.first, n);
    default:
      return sum_squares_of(global(static_cast<const float*>(item.memory.grad)) + at.first, n);
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

PT_RESIDENT_KERNEL(threads, 8) take_stats(PT_ARGUMENT(Job) job, PT_ARGUMENT(Settle) then) {
  PT_SHARED(double, lines, warps);
  PT_SHARED(unsigned, drawn, 1);
  PT_SHARED(unsigned long long, first_bad, 1);
  for (int64_t c = job.first_chunk + blockIdx.x; c < job.n_chunks; c += gridDim.x) {
    const double sum = block_sum(stats_of(job, job.chunks[c]), lines);
    if (threadIdx.x == 0) job.partials[c * core::max_sums] = sum;
  }
  if (!is_last_block(job.ticket, drawn)) return;
  settle_stats(job, lines, first_bad);
  if (threadIdx.x != 0 || !then.n_controls) return;
  settle_by(then);  // the thread that has written what was found
  if (then.scaler) find_move(then);
}

// N elements of an average move towards the parameter's.
template <int N, class T, class H>
PT_DEVICE void average_at(T* average, const H* p, T weight) {
  Vec<T, N> a = *reinterpret_cast<const Vec<T, N>*>(average);
  const Vec<H, N> v = *reinterpret_cast<const Vec<H, N>*>(p);
  for (int e = 0; e < N; ++e) a.x[e] = averaged(a.x[e], value(v.x[e]), weight);
  *reinterpret_cast<Vec<T, N>*>(average) = a;
}

template <class T, class H>
PT_DEVICE void average_chunk(const Item& item, int64_t first, T weight) {
  constexpr int width = 16 / sizeof(T);
  T* const average = global(static_cast<T*>(item.extra.ema)) + first;
  const H* const p = global(static_cast<const H*>(item.memory.param)) + first;
  const int64_t left = item.memory.numel - first, n = left < chunk ? left : chunk;
  const int64_t whole = aligned<T, width>(average) && aligned<H, width>(p) ? n / width * width : 0;
  for (int64_t i = int64_t{threadIdx.x} * width; i < whole; i += threads * width) {
    average_at<width>(average + i, p + i, weight);
  }
  for (int64_t i = whole + threadIdx.x; i < n; i += threads) average_at<1>(average + i, p + i, weight);
}

PT_KERNEL(threads) average(PT_ARGUMENT(Job) job) {
  const float weight = static_cast<float>(job.weight);
  for (int64_t c = job.first_chunk + blockIdx.x; c < job.n_chunks; c += gridDim.x) {
    const Chunk at = job.chunks[c];
    const Item& item = job.items[at.item];
    switch (job.storage.param) {
      case Format::fp64:
        average_chunk<double, double>(item, at.first, job.weight);
        break;
      case Format::bf16:
        average_chunk<float, codec::Bf16>(item, at.first, weight);
        break;
      case Format::fp16:
        average_chunk<float, codec::Fp16>(item, at.first, weight);
        break;
      default:
        average_chunk<float, float>(item, at.first, weight);
    }
  }
}

}  // namespace

const char* launch_stats(const Job& job, const Settle& then, int64_t multiprocessors, void* stream) {
  static const int64_t resident = resident_blocks(take_stats, threads);
  PT_LAUNCH(take_stats, grid(job, multiprocessors * resident), threads, stream, job, then);
  return launch_error();
}

const char* launch_average(const Job& job, int64_t multiprocessors, void* stream) {
  static const int64_t resident = resident_blocks(average, threads);
  PT_LAUNCH(average, grid(job, multiprocessors * resident), threads, stream, job);
  return launch_error();
}

}  // namespace pytrain::cuda
