// One tile of one stream: each function is a loop over formats' codecs that the compiler vectorises. Included once an
// instruction set, inside its target attribute, before storage.h.
#pragma once

namespace pytrain::PT_ISA::cpu {

using pytrain::core::Format;

constexpr int64_t tile = core::random_tile;  // 2 KiB a stream in fp32

template <class H>
__attribute__((noinline)) void decode_tile(const H* from, float* __restrict__ to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = core::decode(from[i]);
}

template <class H>
__attribute__((noinline)) void encode_tile(const float* __restrict__ from, H* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = core::encode(from[i], H{});
}

template <class H>
__attribute__((noinline)) void encode_tile_by_chance(const float* __restrict__ from, H* to,
                                                     const uint16_t* __restrict__ random, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = core::encode(from[i], H{}, uint32_t{random[i]});
}

template <class H>
__attribute__((noinline)) void decode_master_tile(const H* p, const float* __restrict__ master,
                                                  float* __restrict__ to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = core::decode_master(p[i], master[i]);
}

template <class H>
__attribute__((noinline)) void decode_compensated_tile(const H* p, const H* compensation, float* __restrict__ to,
                                                       int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = core::decode_compensated(p[i], compensation[i]);
}

template <class H>
__attribute__((noinline)) void encode_compensated_tile(const float* __restrict__ from, H* __restrict__ p,
                                                       H* __restrict__ compensation, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = core::encode_compensated(from[i], compensation[i]);
}

__attribute__((noinline)) void decode_low_bits_tile(const core::Bf16* p, const int16_t* __restrict__ low,
                                                    float* __restrict__ to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = core::decode_low_bits(p[i], low[i]);
}

__attribute__((noinline)) void encode_low_bits_tile(const float* __restrict__ from, core::Bf16* __restrict__ p,
                                                    int16_t* __restrict__ low, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = core::encode_low_bits(from[i], low[i]);
}

__attribute__((noinline)) void random_tile(uint32_t key, uint16_t* __restrict__ to) {
  constexpr uint32_t half = core::random_tile / 2;
  for (uint32_t lane = 0; lane < half; ++lane) {
    const uint32_t bits = core::spread(lane, key);
    to[lane] = static_cast<uint16_t>(bits);
    to[half + lane] = static_cast<uint16_t>(bits >> 16);
  }
}

__attribute__((noinline)) void mixed_tile(uint32_t key, const uint16_t* __restrict__ from, uint16_t* __restrict__ to) {
  for (int64_t i = 0; i < core::random_tile; ++i) to[i] = core::mixed(from[i], key);
}

// The largest magnitude of a block, as the block's scale: 0 if all is 0, else from 2^-100 to the largest finite number.
__attribute__((noinline)) float block_scale(const float* x, int64_t n) {
  int32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t bits = static_cast<int32_t>(core::as_bits(x[i]) & 0x7fffffffu);
    largest = bits > largest ? bits : largest;
  }
  if (largest == 0) return 0.0f;
  constexpr int32_t low = 27 << 23, high = 0x7f7fffff;
  return core::as_float(static_cast<uint32_t>(largest < low ? low : largest > high ? high : largest));
}

template <Format F>
__attribute__((noinline)) void decode_codes(const uint8_t* from, float scale, float* __restrict__ to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = F == Format::s8 ? core::decode_signed(from[i], scale) : core::decode_unsigned(from[i], scale);
  }
}

template <Format F>
__attribute__((noinline)) void encode_codes(const float* __restrict__ from, float scale, uint8_t* __restrict__ to,
                                            int64_t n) {
  const float inverse = 1.0f / scale;
  for (int64_t i = 0; i < n; ++i) {
    to[i] = F == Format::s8 ? core::encode_signed(from[i] * inverse, core::half_unit)
                            : core::encode_unsigned(from[i] * inverse, core::half_unit);
  }
}

template <Format F>
__attribute__((noinline)) void encode_codes_by_chance(const float* __restrict__ from, float scale,
                                                      uint8_t* __restrict__ to, const uint16_t* __restrict__ random,
                                                      int64_t n) {
  const float inverse = 1.0f / scale;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t cut = uint32_t{random[i]} << 4;
    to[i] = F == Format::s8 ? core::encode_signed(from[i] * inverse, cut)
                            : core::encode_unsigned(from[i] * inverse, cut);
  }
}

// g * coef within [-limit, limit]; nan stays nan.
template <class T>
__attribute__((noinline)) void clamp_tile(const T* g, T coef, T limit, T* to, int64_t n) {
#ifdef __clang__
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
  for (int64_t i = 0; i < n; ++i) {
    const T x = g[i] * coef;
    const T low = x < -limit ? -limit : x;
    to[i] = low > limit ? limit : low;
  }
}

template <class T>
__attribute__((noinline)) void average_tile(T* __restrict__ ema, const T* __restrict__ p, T weight, int64_t n) {
  if (weight == T(1)) {  // whatever stood there
    for (int64_t i = 0; i < n; ++i) ema[i] = p[i];
    return;
  }
  for (int64_t i = 0; i < n; ++i) ema[i] = rules::lerp(ema[i], p[i], weight);
}

}  // namespace pytrain::PT_ISA::cpu
