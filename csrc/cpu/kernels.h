// The one loop on the CPU, for every rule and format. Included once an instruction set, inside its target attribute.
#pragma once

namespace pytrain::PT_ISA::cpu {

using pytrain::core::Control;
using pytrain::core::GroupRow;
using pytrain::core::Segment;

// n elements in T = float or double, straight through memory. Not inlined, so that a disassembly can name it.
template <class Rule, class T, int... I>
__attribute__((noinline)) void update(const Rule& prepared, T grad_coef, T* __restrict__ p, const T* __restrict__ g,
                                      T* const* s, int64_t n, std::integer_sequence<int, I...>) {
  const Rule rule = prepared;  // a local that no store can alias: its coefficients stay in registers
  T* const states[] = {s[I]..., nullptr};
#ifdef __clang__
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
  for (int64_t i = 0; i < n; ++i) {
    // Everything is loaded before anything is stored. Large tensors start at the same offset in a page, and a store
    // holds up later loads whose addresses agree with it in the low 12 bits: 14.4 against 8.4 ms for 10 M elements.
    T value[] = {states[I][i]..., T(0)};
    const T old = p[i];
    const T next = old - rule(old, g[i] * grad_coef, value[I]...);
    p[i] = next;
    ((states[I][i] = value[I]), ...);
  }
}

template <class H>
__attribute__((noinline)) void decode_tile(const H* from, float* __restrict__ to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = core::decode(from[i]);
}

template <class H>
__attribute__((noinline)) void encode_tile(const float* __restrict__ from, H* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = core::encode(from[i], H{});
}

// n elements of one segment from element `first` on, stored as T: fp32 and fp64 directly, halves tile by tile in fp32.
template <class Rule, class T, int... I>
void run(const Rule& rule, double grad_coef, const Segment& segment, int64_t first, int64_t n,
         std::integer_sequence<int, I...> states) {
  T* const p = static_cast<T*>(segment.param) + first;
  const T* const g = static_cast<const T*>(segment.grad) + first;
  T* const s[] = {static_cast<T*>(segment.states[I]) + first..., nullptr};
  if constexpr (std::is_floating_point_v<T>) {
    update<Rule, T>(rule, T(grad_coef), p, g, s, n, states);
  } else {
    constexpr int64_t tile = 512;  // 2 KiB a stream: five of them leave room in the smallest L1
    float tile_p[tile], tile_g[tile], tile_s[sizeof...(I) + 1][tile];
    float* const tile_states[] = {tile_s[I]..., nullptr};
    for (int64_t done = 0; done < n; done += tile) {
      const int64_t m = n - done < tile ? n - done : tile;
      decode_tile(p + done, tile_p, m);
      decode_tile(g + done, tile_g, m);
      (decode_tile(s[I] + done, tile_s[I], m), ...);
      update<Rule, float>(rule, float(grad_coef), tile_p, tile_g, tile_states, m, states);
      encode_tile(tile_p, p + done, m);
      (encode_tile(tile_s[I], s[I] + done, m), ...);
    }
  }
}

template <class Rule>
Rule prepare(const GroupRow& row, double step) {
  typename Rule::Hyper hyper;
  static_assert(sizeof hyper <= sizeof row.hypers && sizeof hyper == sizeof(double) * rules::hyper_count<Rule>());
  __builtin_memcpy(&hyper, row.hypers, sizeof hyper);
  return Rule(hyper, step);
}

template <class Rule, class T>
void step(const Segment* segments, const int64_t* offsets, int64_t n_segments, const Control* control, int64_t begin,
          int64_t end) {
  // The last segment that starts at or before `begin`.
  int64_t low = 0, high = n_segments - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (offsets[middle] <= begin) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const GroupRow* const rows = reinterpret_cast<const GroupRow*>(control + 1);
  int64_t group = segments[low].group;
  double count = segments[low].step;
  Rule rule = prepare<Rule>(rows[group], count);
  for (int64_t i = low; i < n_segments && offsets[i] < end; ++i) {
    const Segment& segment = segments[i];
    const int64_t first = begin > offsets[i] ? begin - offsets[i] : 0;
    const int64_t last = end - offsets[i] < segment.numel ? end - offsets[i] : segment.numel;
    if (first >= last) continue;
    if (segment.group != group || segment.step != count) {
      group = segment.group;
      count = segment.step;
      rule = prepare<Rule>(rows[group], count);
    }
    run<Rule, T>(rule, rows[group].grad_sign * control->inv_scale, segment, first, last - first,
                 std::make_integer_sequence<int, rules::state_count<Rule>()>{});
  }
}

template <class... Rules>
constexpr pytrain::cpu::Kernels table(rules::List<Rules...>) {
  return {{{&step<Rules, float>, &step<Rules, double>, &step<Rules, core::Bf16>, &step<Rules, core::Fp16>}...}};
}

}  // namespace pytrain::PT_ISA::cpu

namespace pytrain::PT_ISA {
extern const pytrain::cpu::Kernels kernels;
constexpr pytrain::cpu::Kernels kernels = cpu::table(rules::All{});
}  // namespace pytrain::PT_ISA
