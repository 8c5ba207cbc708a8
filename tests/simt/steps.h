// Steps of every rule through the kernels, against the slow reference that the CPU's loops are held to: bit for bit, in
// any order of blocks and threads. Where a rule takes sums, the kernels' own are held to the reference's by a tolerance
// and then used by it.
#pragma once

#include <algorithm>

#include "kernels/kinds.h"
#include "simt/shim.h"
#include "simt/world.h"

extern "C" const void* pytrain_backend();
extern "C" void pytrain_simt_order(int order, unsigned long long seed);

inline const cuda::Backend& backend() { return *static_cast<const cuda::Backend*>(pytrain_backend()); }

struct Order {
  const char* name;
  int order;
  unsigned long long seed;
};
constexpr Order orders[] = {{"forward", 0, 0}, {"reverse", 1, 0}, {"seed 1", 2, 1}, {"seed 2", 2, 2}};

// Forward alone, or all.
inline int n_orders = 4;
inline bool few = false;  // cases, where many are alike
inline Checks checks;

// What is to be tested; all where nothing is named.
inline std::vector<std::string> areas;
inline bool wanted(const char* area) {
  return areas.empty() || std::find(areas.begin(), areas.end(), area) != areas.end();
}

// As class_of in csrc/ops/device.cpp.
inline cuda::Class class_of(const Storage& storage) {
  bool direct = storage.keep == Keep::nothing && !storage.stochastic;
  for (const Format state : storage.states) direct = direct && (state == storage.param || state == Format::none);
  if (direct && storage.param == Format::fp32) return cuda::Class::fp32;
  return storage.param == Format::fp64 ? cuda::Class::fp64 : cuda::Class::mixed;
}

inline bool wanted(const Storage& storage) {
  const cuda::Class kind = class_of(storage);
  return wanted(kind == cuda::Class::fp32 ? "fp32" : kind == cuda::Class::fp64 ? "fp64" : "mixed");
}

// How a step is launched.
struct How {
  bool by_value = true;  // the settings; else they stand in the control block
  bool fresh = true;     // nothing but the settings is known of the step
  bool serial = false;   // one launch a parameter
  int64_t blocks = 3;
};

inline void must(const char* error) {
  if (error) checks.check(false, error);
}

// As run_on_device there.
inline void launch(World& world, int rule, bool sums, const How& how) {
  const cuda::Class kind = class_of(world.storage);
  world.settings(how.by_value, how.fresh);
  cuda::Job job = world.job;
  if (sums) must(backend().step(kind, rule, true, job, how.blocks, nullptr));
  if (!how.serial) return must(backend().step(kind, rule, false, job, how.blocks, nullptr));
  for (int64_t i = 0; i < world.job.n_items; ++i) {
    job.first_item = i;
    job.n_items = i + 1;
    job.first_chunk = job.items[i].first_chunk;
    job.n_chunks = job.items[i].first_chunk + job.items[i].n_chunks;
    must(backend().step(kind, rule, false, job, how.blocks, nullptr));
  }
}

struct Stepper {
  RuleUnderTest rule;
  Apply<float> apply32;
  Apply<double> apply64;

  // A step in the slow way, a parameter at a time.
  void reference(World& world, const double* totals, const How& how, const std::string& what) const {
    given_sums.tolerance = world.storage.param == Format::fp64 ? 1e-13 : 8 * 0x1p-24;  // eight terms in fp32
    given_sums.apart = false;
    for (size_t k = 0; k < world.segments.size(); ++k) {
      const Control control{world.head(), {world.row(world.segments[k].group)}};
      Segment segment = world.segments[k];
      segment.group = 0;
      Control used = control;
      if (how.fresh) used.rows[0].clip_coef = 1.0;
      given_sums.sums = rule.n_sums ? totals + k * pytrain::core::max_sums : nullptr;
      if (world.storage.param == Format::fp64) {
        reference_segment(world.storage, used, segment, world.extras[k], rule.n_states, apply64);
      } else {
        reference_segment(world.storage, used, segment, world.extras[k], rule.n_states, apply32);
      }
      world.set_numbers(k, world.segments[k].step, world.extras[k].scalars);
    }
    checks.check(!given_sums.apart, (what + ": sums").c_str());
  }

  void check(const Kind& kind, const Shape& shape, const How& how) {
    if (!wanted(storage_of(kind, rule))) return;
    rule.control.head.clip_value = kind.clip_value;
    rule.control.head.grad_norm = 7.0;
    World expected(rule, storage_of(kind, rule), shape);
    std::vector<double> totals;
    for (int o = 0; o < n_orders; ++o) {
      const std::string where = std::to_string(shape.counts.size()) + " parameters, shifted " +
                                std::to_string(shape.shifted) + ", " + std::to_string(shape.groups) + " groups, " +
                                std::to_string(how.blocks) + " blocks, " + orders[o].name;
      const std::string what = std::string(rule.name) + " in " + kind.name + ", " + where;
      pytrain_simt_order(orders[o].order, orders[o].seed);
      World world(rule, expected.storage, shape);
      launch(world, rule.index, rule.n_sums > 0, how);
      const size_t n = world.segments.size() * pytrain::core::max_sums;
      const std::vector<double> sums(world.job.totals, world.job.totals + n);
      if (o == 0) {
        totals = sums;
        reference(expected, totals.data(), how, what);
      }
      checks.check(!n || !std::memcmp(sums.data(), totals.data(), n * sizeof(double)), (what + ": sums").c_str());
      checks.check(world.same_memory(expected), (what + ": memory").c_str());
      checks.check(world.same_numbers(expected), (what + ": counts, scalars, control").c_str());
    }
  }

  // A step that another launch has found to be bad writes nothing but the zeros of gradients that it was to zero.
  void check_skip(const Kind& kind, const Shape& shape, bool by_value) {
    if (!wanted(storage_of(kind, rule))) return;
    rule.control.head.clip_value = 0.0;
    rule.control.head.found_inf = 1.0;
    World expected(rule, storage_of(kind, rule), shape), world(rule, expected.storage, shape);
    for (const Segment& segment : expected.segments) {
      for (int64_t i = 0; kind.zero_grad && i < segment.numel; ++i) put(kind.param, segment.grad, i, 0.0);
    }
    launch(world, rule.index, rule.n_sums > 0, {by_value, false});
    const std::string what = std::string(rule.name) + " in " + kind.name + ", skipped";
    checks.check(world.same_memory(expected) && world.same_numbers(expected), what.c_str());
    rule.control.head.found_inf = 0.0;
  }

  void check_all() {
    const int before = checks.failed;
    const Shape sizes{{0, 1, 3, 255, 256, 257, 4095, 4096, 4097, 9000}, 0, 2};
    Shape off = sizes, tiny{{}, 0, 3}, rows{{}, 0, cuda::Settings::max_rows + 3}, odd{{1030, 5000, 2, 700}, 0, 2};
    off.shifted = every_stream;
    for (int64_t k = 0; k < 300; ++k) tiny.counts.push_back(k % 7);
    for (int64_t k = 0; k < 2 * rows.groups; ++k) rows.counts.push_back(40 + k);
    int number = 0;
    for (const Kind& kind : kinds) {
      ++number;
      if (few && number % 3 != rule.index % 3 && number > 4) continue;
      check(kind, sizes, {true, number % 2 == 0, false, number % 4 ? 3 : 1});
      odd.shifted = 1u << (number % 8);  // one stream alone
      check(kind, odd, {number % 3 == 0, number % 3 == 0, false, 1000});
      check(kind, off, {true, true, number % 5 == 0, 5});
      check_skip(kind, {{300, 0, 5000}, number % 3 ? 0u : 1u << of_grad}, number % 2 == 0);
    }
    for (const Kind& kind : {kinds[0], kinds[2]}) {
      check(kind, tiny, {true, false, false, 7});
      check(kind, rows, {false, false, false, 4});
    }
    const bool long_ones = rule.n_sums > 0 || rule.index % 6 == 0;
    const int64_t many = cuda::few_chunks * cuda::chunk;
    if (long_ones) check(kinds[0], {{5, many + 1, 20, many + 4100, many}, 0, 2}, {true, true, false, 6});
    if (long_ones && !few) check(kinds[2], {{many + 1}, 0, 1}, {true, true, false, 6});
    if (checks.failed != before) std::printf("%-26s FAILED\n", rule.name);
  }
};

template <class... Rules>
void check_rules(rules::List<Rules...>) {
  int rule = 0;
  (Stepper{rule_under_test<Rules>(rule++), &apply_any<Rules, float>, &apply_any<Rules, double>}.check_all(), ...);
}
