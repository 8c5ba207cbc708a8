// Copies of many tensors at a time, with casts: to <- source * scale, or to += source * scale. Arithmetic is fp32, each
// operation rounded, or fp64 between fp64 tensors. Included once an instruction set, after storage.h.
#pragma once

namespace pytrain::PT_ISA::cpu {

using pytrain::cpu::CopyJob;

// `to` may be `from` itself, here and below.
template <class T>
__attribute__((noinline)) void scale_tile(const T* from, T scale, T* to, int64_t n) {
#ifdef __clang__
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
  for (int64_t i = 0; i < n; ++i) to[i] = from[i] * scale;
}

template <class T>
__attribute__((noinline)) void add_scaled_tile(const T* from, T scale, T* to, int64_t n) {
#ifdef __clang__
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
  for (int64_t i = 0; i < n; ++i) to[i] += from[i] * scale;
}

template <class To, class From>
constexpr bool same = std::is_same_v<To, From>;

// The dtypes differ, and nothing is to be computed.
template <class To, class From>
void cast(To* to, const From* from, int64_t n) {
  if constexpr (same<To, float>) {
    decode_tile(from, to, n);
  } else if constexpr (same<From, float>) {
    encode_tile(from, to, n);
  } else {
    float values[tile];
    for (int64_t i = 0; i < n; i += tile) {
      const int64_t m = n - i < tile ? n - i : tile;
      decode_tile(from + i, values, m);
      encode_tile(values, to + i, m);
    }
  }
}

template <class To, class From>
void copy_scaled(To* to, const From* from, float scale, bool accumulate, int64_t n) {
  float values[tile], results[tile];
  for (int64_t i = 0; i < n; i += tile) {
    const int64_t m = n - i < tile ? n - i : tile;
    const float* x = values;
    float* y = results;
    if constexpr (same<From, float>) {
      x = from + i;
    } else {
      decode_tile(from + i, values, m);
    }
    if constexpr (same<To, float>) {
      y = to + i;
    } else if (accumulate) {
      decode_tile(to + i, results, m);
    }
    if (accumulate) {
      add_scaled_tile(x, scale, y, m);
    } else {
      scale_tile(x, scale, y, m);
    }
    if constexpr (!same<To, float>) encode_tile(results, to + i, m);
  }
}

template <class To, class From>
void copy_as(const CopyJob& job, const CopyJob::Segment& segment, int64_t first, int64_t n) {
  To* const to = static_cast<To*>(segment.to) + first;
  const From* const from = static_cast<const From*>(segment.from) + first;
  if constexpr (same<To, double>) {
    if (job.accumulate) return add_scaled_tile(from, job.scale, to, n);
    if (job.scale != 1.0) return scale_tile(from, job.scale, to, n);
  } else {
    const float scale = static_cast<float>(job.scale);
    if (job.accumulate || scale != 1.0f) return copy_scaled(to, from, scale, job.accumulate, n);
  }
  if constexpr (!same<To, From>) {
    cast(to, from, n);
  } else if (to != from) {
    __builtin_memcpy(to, from, n * sizeof(To));
  }
}

template <class To>
void copy_to(const CopyJob& job, const CopyJob::Segment& segment, int64_t first, int64_t n) {
  switch (segment.from_format) {
    case Format::bf16:
      return copy_as<To, core::Bf16>(job, segment, first, n);
    case Format::fp16:
      return copy_as<To, core::Fp16>(job, segment, first, n);
    default:
      return copy_as<To, float>(job, segment, first, n);
  }
}

void copy_all(const CopyJob& job, int64_t begin, int64_t end) {
  walk(job, begin, end, [&](int64_t i, int64_t first, int64_t n) {
    const CopyJob::Segment& segment = job.segments[i];
    switch (segment.to_format) {
      case Format::fp64:
        return copy_as<double, double>(job, segment, first, n);
      case Format::bf16:
        return copy_to<core::Bf16>(job, segment, first, n);
      case Format::fp16:
        return copy_to<core::Fp16>(job, segment, first, n);
      default:
        return copy_to<float>(job, segment, first, n);
    }
  });
}

}  // namespace pytrain::PT_ISA::cpu
