// Copies between tensors in every pair of formats, against one element at a time; and what they move.
#pragma once

#include "simt/steps.h"
#include "simt/traffic.h"

struct Formats {
  const char* name;
  Format to, from;
};
constexpr Formats copied[] = {
    {"fp32 to fp32", Format::fp32, Format::fp32}, {"bf16 to fp32", Format::fp32, Format::bf16},
    {"fp16 to fp32", Format::fp32, Format::fp16}, {"fp32 to bf16", Format::bf16, Format::fp32},
    {"bf16 to bf16", Format::bf16, Format::bf16}, {"fp16 to bf16", Format::bf16, Format::fp16},
    {"fp32 to fp16", Format::fp16, Format::fp32}, {"bf16 to fp16", Format::fp16, Format::bf16},
    {"fp16 to fp16", Format::fp16, Format::fp16}, {"fp64 to fp64", Format::fp64, Format::fp64},
};

// Pairs between sentinels, as copy_on_device in csrc/ops/copy.cpp hands them over.
struct Copied {
  Arena memory;
  cuda::Copies job{};

  // `shifted`: bit 0 puts targets one element off, bit 1 sources.
  Copied(const Formats& formats, const std::vector<int64_t>& counts, unsigned shifted, double scale, bool accumulate)
      : memory(room(counts), true) {
    job.to_format = formats.to;
    job.from_format = formats.from;
    job.scale = scale;
    job.accumulate = accumulate;
    Random random;
    for (const int64_t n : counts) {
      void* const to = fill(formats.to, n, shifted & 1, random);
      const void* const from = fill(formats.from, n, shifted & 2, random);
      job.pairs[job.n++] = {to, from, n, job.n_chunks};
      job.n_chunks += (n + cuda::chunk - 1) / cuda::chunk;
    }
  }
  static size_t room(const std::vector<int64_t>& counts) {
    size_t bytes = 1 << 12;
    for (const int64_t n : counts) bytes += 2048 + static_cast<size_t>(n) * 16;
    return bytes;
  }
  void* fill(Format format, int64_t n, bool shift, Random& random) {
    void* const at = memory.take(n * bytes(format), shift ? bytes(format) : 0);
    // Sizes from fp16's subnormal numbers to beyond its largest.
    for (int64_t i = 0; i < n; ++i) {
      put(format, at, i, (2.0 * random.next() - 1.0) * std::ldexp(1.0, static_cast<int>(random.bits() % 44) - 26));
    }
    return at;
  }
  // One element at a time.
  void copy() {
    for (int64_t k = 0; k < job.n; ++k) {
      const cuda::Copies::Pair& pair = job.pairs[k];
      for (int64_t i = 0; i < pair.numel; ++i) {
        const double x = get(job.from_format, pair.from, i), y = get(job.to_format, pair.to, i);
        if (job.to_format == Format::fp64) {
          put(Format::fp64, pair.to, i, job.accumulate ? y + x * job.scale : x * job.scale);
        } else {
          const float product = static_cast<float>(x) * static_cast<float>(job.scale);
          put(job.to_format, pair.to, i, job.accumulate ? static_cast<float>(y) + product : product);
        }
      }
    }
  }
};

inline void check_copies() {
  const std::vector<int64_t> sizes = {1, 3, 255, 257, 4095, 4096, 4097, 9000};
  std::vector<int64_t> tiny;
  for (int64_t k = 0; k < cuda::Copies::most; ++k) tiny.push_back(1 + k % 9);
  for (const Formats& formats : copied) {
    for (const double scale : {1.0, 0.3}) {
      for (const bool accumulate : {false, true}) {
        for (unsigned shifted = 0; shifted < 4; ++shifted) {
          if (few && shifted != (accumulate ? 1u : 0u) + (scale == 1.0 ? 2u : 0u) && shifted) continue;
          for (int o = 0; o < n_orders; ++o) {
            pytrain_simt_order(orders[o].order, orders[o].seed);
            for (const auto& counts : {sizes, tiny, {70000}}) {
              Copied got(formats, counts, shifted, scale, accumulate);
              Copied wanted(formats, counts, shifted, scale, accumulate);
              must(backend().copy(got.job, 3, nullptr));
              wanted.copy();
              checks.check(got.memory == wanted.memory, (std::string("copies of ") + formats.name).c_str(), scale);
            }
          }
        }
      }
    }
  }
}

inline void meter_copies(Meter& meter) {
  for (const Formats& formats : copied) {
    const double to = static_cast<double>(bytes(formats.to)), from = static_cast<double>(bytes(formats.from));
    Copied plain(formats, {Meter::n}, 0, 1.0, false), added(formats, {4096, 4096}, 0, 0.3, true);
    meter.row(std::string("copies of ") + formats.name, Meter::n, to + from,
              [&] { must(backend().copy(plain.job, 2, nullptr)); });
    meter.row(std::string("copies of ") + formats.name + ", added", Meter::n, 2.0 * to + from,
              [&] { must(backend().copy(added.job, 2, nullptr)); });
  }
  Copied off(copied[0], {Meter::n}, 2, 1.0, false);
  meter.row("copies of fp32 to fp32, the source one element off", Meter::n, 8.0,
            [&] { must(backend().copy(off.job, 2, nullptr)); });
}
