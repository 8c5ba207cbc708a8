// Copies of many tensors in one launch, with casts: to <- source * scale, or to += source * scale.
#include "cuda/backend.h"
#include "cuda/block.h"

namespace pytrain::cuda {
namespace {

PT_DEVICE double stored(double x, double) { return x; }
PT_DEVICE float stored(float x, float) { return x; }
PT_DEVICE codec::Bf16 stored(float x, codec::Bf16 as) { return codec::encode(x, as); }
PT_DEVICE codec::Fp16 stored(float x, codec::Fp16 as) { return codec::encode(x, as); }

// N elements. What is neither scaled nor added to is not multiplied either: a product would change a nan's bits.
template <int N, class To, class From, class T>
PT_DEVICE void copy_at(To* to, const From* from, T scale, bool accumulate) {
  const Vec<From, N> x = *reinterpret_cast<const Vec<From, N>*>(from);
  Vec<To, N> y;
  if (accumulate) {
    y = *reinterpret_cast<const Vec<To, N>*>(to);
    for (int e = 0; e < N; ++e) y.x[e] = stored(value(y.x[e]) + value(x.x[e]) * scale, To{});
  } else if (scale != T(1)) {
    for (int e = 0; e < N; ++e) y.x[e] = stored(value(x.x[e]) * scale, To{});
  } else if constexpr (std::is_same_v<To, From>) {
    y = x;
  } else {
    for (int e = 0; e < N; ++e) y.x[e] = stored(value(x.x[e]), To{});
  }
  *reinterpret_cast<Vec<To, N>*>(to) = y;
}

template <class To, class From>
PT_DEVICE void copy_chunk(const Copies& job, const Copies::Pair& pair, int64_t first) {
  using T = decltype(value(To{}));
  constexpr int width = 16 / (sizeof(To) > sizeof(From) ? sizeof(To) : sizeof(From));
  To* const to = global(static_cast<To*>(pair.to)) + first;
  const From* const from = global(static_cast<const From*>(pair.from)) + first;
  const T scale = static_cast<T>(job.scale);
  const bool accumulate = job.accumulate != 0;
  const int64_t left = pair.numel - first, n = left < chunk ? left : chunk;
  const int64_t whole = aligned<To, width>(to) && aligned<From, width>(from) ? n / width * width : 0;
  for (int64_t i = int64_t{threadIdx.x} * width; i < whole; i += threads * width) {
    copy_at<width>(to + i, from + i, scale, accumulate);
  }
  for (int64_t i = whole + threadIdx.x; i < n; i += threads) copy_at<1>(to + i, from + i, scale, accumulate);
}

template <class To>
PT_DEVICE void copy_to(const Copies& job, const Copies::Pair& pair, int64_t first) {
  switch (job.from_format) {
    case Format::bf16:
      return copy_chunk<To, codec::Bf16>(job, pair, first);
    case Format::fp16:
      return copy_chunk<To, codec::Fp16>(job, pair, first);
    default:
      return copy_chunk<To, float>(job, pair, first);
  }
}

// The pair that a chunk is of: the last one that begins at it or before.
PT_DEVICE const Copies::Pair& pair_of(const Copies& job, int64_t c) {
  int64_t low = 0, high = job.n - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (job.pairs[middle].first_chunk <= c) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return job.pairs[low];
}

// So many blocks keep enough loads on their way for the memory to be busy.
PT_RESIDENT_KERNEL(threads, 6) copy(PT_ARGUMENT(Copies) job) {
  for (int64_t c = blockIdx.x; c < job.n_chunks; c += gridDim.x) {
    const Copies::Pair& pair = pair_of(job, c);
    const int64_t first = (c - pair.first_chunk) * chunk;
    switch (job.to_format) {
      case Format::fp64:
        copy_chunk<double, double>(job, pair, first);
        break;
      case Format::bf16:
        copy_to<codec::Bf16>(job, pair, first);
        break;
      case Format::fp16:
        copy_to<codec::Fp16>(job, pair, first);
        break;
      default:
        copy_to<float>(job, pair, first);
    }
  }
}

}  // namespace

const char* launch_copy(const Copies& job, int64_t multiprocessors, void* stream) {
  static const int64_t resident = resident_blocks(copy, threads);
  const int64_t most = multiprocessors * resident;
  PT_LAUNCH(copy, static_cast<unsigned>(job.n_chunks < most ? job.n_chunks : most), threads, stream, job);
  return launch_error();
}

}  // namespace pytrain::cuda
