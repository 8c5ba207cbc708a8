// The loops over segments that know no rule: pass 1, which takes the sums of squares of gradients, in double and in an
// order that depends on nothing but the sizes; and weight averages outside of a step. Included once an
// instruction set, after storage.h.
#pragma once

namespace pytrain::PT_ISA::cpu {

// Lane i % 16 takes number i, then the lanes are added from the first to the last; as core::sum.
template <class T>
__attribute__((noinline)) double sum_squares(const T* x, int64_t n) {
  double total[core::sum_lanes] = {};
  int64_t i = 0;
  for (; i + core::sum_lanes <= n; i += core::sum_lanes) {
    for (int lane = 0; lane < core::sum_lanes; ++lane) {
      const double value = static_cast<double>(x[i + lane]);
      total[lane] += value * value;
    }
  }
  for (int lane = 0; i + lane < n; ++lane) {
    const double value = static_cast<double>(x[i + lane]);
    total[lane] += value * value;
  }
  double result = 0.0;
  for (int lane = 0; lane < core::sum_lanes; ++lane) result += total[lane];
  return result;
}

// The square of a finite double may be infinite, so that its sum does not tell. 0 times an inf or nan is nan.
__attribute__((noinline)) bool finite_words(const double* x, int64_t n) {
  double total[core::sum_lanes] = {};
  int64_t i = 0;
  for (; i + core::sum_lanes <= n; i += core::sum_lanes) {
    for (int lane = 0; lane < core::sum_lanes; ++lane) total[lane] += x[i + lane] * 0.0;
  }
  for (; i < n; ++i) total[0] += x[i] * 0.0;
  double sum = 0.0;
  for (int lane = 0; lane < core::sum_lanes; ++lane) sum += total[lane];
  return sum == 0.0;
}

template <class H>
double sum_squares_of_half(const H* g, int64_t n) {
  float values[tile];
  double sum = 0.0;
  for (int64_t i = 0; i < n; i += tile) {
    const int64_t m = n - i < tile ? n - i : tile;
    decode_tile(g + i, values, m);
    sum += sum_squares(values, m);
  }
  return sum;
}

// Of one block; nan where a gradient is inf or nan.
double block_stats(Format format, const void* grad, int64_t first, int64_t n) {
  const double bad = std::numeric_limits<double>::quiet_NaN();
  if (format == Format::fp64) {
    const double* const g = static_cast<const double*>(grad) + first;
    return finite_words(g, n) ? sum_squares(g, n) : bad;
  }
  const double sum = format == Format::bf16   ? sum_squares_of_half(static_cast<const core::Bf16*>(grad) + first, n)
                     : format == Format::fp16 ? sum_squares_of_half(static_cast<const core::Fp16*>(grad) + first, n)
                                              : sum_squares(static_cast<const float*>(grad) + first, n);
  return sum <= std::numeric_limits<double>::max() ? sum : bad;  // no finite float has a square beyond double
}

void stats(const Job& job, int64_t begin, int64_t end) {
  walk(job, begin, end, [&](int64_t i, int64_t first, int64_t n) {
    call_next_grad(job, i);
    double* partial = job.partials + job.partial_offsets[i] + first / block;
    for (const int64_t last = first + n; first < last; first += block, ++partial) {
      const int64_t m = last - first < block ? last - first : block;
      *partial = block_stats(job.storage.param, job.segments[i].grad, first, m);
    }
  });
}

template <class H>
void average_half(float* average, const H* p, float weight, int64_t n) {
  float values[tile];
  for (int64_t i = 0; i < n; i += tile) {
    const int64_t m = n - i < tile ? n - i : tile;
    decode_tile(p + i, values, m);
    average_tile(average + i, values, weight, m);
  }
}

void average_all(const pytrain::cpu::AverageJob& job, int64_t begin, int64_t end) {
  walk(job, begin, end, [&](int64_t i, int64_t first, int64_t n) {
    const auto& segment = job.segments[i];
    float* const average = static_cast<float*>(segment.average) + first;
    const float weight = static_cast<float>(job.weight);
    switch (segment.format) {
      case Format::fp64:
        return average_tile(static_cast<double*>(segment.average) + first,
                            static_cast<const double*>(segment.param) + first, job.weight, n);
      case Format::bf16:
        return average_half(average, static_cast<const core::Bf16*>(segment.param) + first, weight, n);
      case Format::fp16:
        return average_half(average, static_cast<const core::Fp16*>(segment.param) + first, weight, n);
      default:
        return average_tile(average, static_cast<const float*>(segment.param) + first, weight, n);
    }
  });
}

}  // namespace pytrain::PT_ISA::cpu
