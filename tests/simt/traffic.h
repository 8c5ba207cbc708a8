// What launches move between the parameters' memory and the threads, as JSON for the budgets in budgets.json: bytes a
// parameter, the least that its storage asks for, bytes of each 32-byte sector that were wanted, and how many accesses
// of each width 4096 parameters take.
#pragma once

#include "simt/steps.h"

struct Meter {
  static constexpr int64_t n = 2 * cuda::chunk;
  const char* separator = "\n";

  // Measures body() and prints it.
  template <class Body>
  void row(const std::string& what, int64_t numel, double least, Body body) {
    simt::take_traffic();
    body();
    const simt::Traffic t = simt::take_traffic();
    const double bytes = static_cast<double>(t.read + t.written);
    std::printf("%s\"%s\": {\"bytes\": %.4f, ", separator, what.c_str(), bytes / static_cast<double>(numel));
    if (least > 0.0) std::printf("\"least\": %.4f, ", least);
    const double touched = 32.0 * static_cast<double>(t.sectors);
    std::printf("\"efficiency\": %.4f, \"accesses\": {", touched > 0.0 ? bytes / touched : 0.0);
    const char* comma = "";
    for (int s = 4; s >= 0; --s) {
      if (!t.accesses[s]) continue;
      std::printf("%s\"%d\": %g", comma, 1 << s, static_cast<double>(t.accesses[s] * cuda::chunk) / numel);
      comma = ", ";
    }
    std::printf("}}");
    separator = ",\n";
  }

  // Read and write all but the gradient, which is read, and written where it is zeroed.
  static double least(const RuleUnderTest& rule, const Storage& storage) {
    const double half = static_cast<double>(bytes(storage.param)), wide = storage.param == Format::fp64 ? 8.0 : 4.0;
    double sum = half * (storage.zero_grad ? 4.0 : 3.0) + (storage.ema ? 2.0 * wide : 0.0);
    for (int s = 0; s < rule.n_states; ++s) {
      sum += 2.0 * bytes(storage.states[s]) + (bytes(storage.states[s]) == 1 ? 8.0 / pytrain::core::code_block : 0.0);
    }
    if (storage.keep == Keep::master) sum += 8.0;
    if (storage.keep == Keep::low_bits || storage.keep == Keep::compensation) sum += 4.0;
    return sum;
  }

  void step(const RuleUnderTest& rule, const Kind& kind, const Shape& shape, const std::string& name) {
    const Storage storage = storage_of(kind, rule);
    if (!wanted(storage)) return;
    World world(rule, storage, shape);
    world.settings(true, true);
    const cuda::Class type = class_of(storage);
    int64_t numel = 0;
    for (const int64_t count : shape.counts) numel += count;
    if (rule.n_sums) {
      row(name + ", its sums", numel, 0.0,
          [&] { must(backend().step(type, rule.index, true, world.job, 2, nullptr)); });
    }
    row(name, numel, rule.n_sums ? 0.0 : least(rule, storage),
        [&] { must(backend().step(type, rule.index, false, world.job, 2, nullptr)); });
  }

  // All rules alike; and for one, how it fares where tensors are not whole or not aligned.
  void rule(const RuleUnderTest& rule) {
    for (const int kind : {0, 1, 2, 3, 4, 9, 11, 13, 16}) {
      step(rule, kinds[kind], {{n}, 0, 1}, std::string(rule.name) + " in " + kinds[kind].name);
    }
    if (std::string(rule.name) != "adamw") return;
    step(rule, kinds[0], {{4096, 4096, 8192}, 0, 2}, "adamw in fp32, three parameters");
    step(rule, kinds[0], {{4097}, 0, 1}, "adamw in fp32, a tail of one");
    step(rule, kinds[0], {{n}, 1u << of_grad, 1}, "adamw in fp32, the gradient one element off");
    step(rule, kinds[2], {{n}, every_stream, 1}, "adamw in bf16, all one element off");
    if (!wanted("fp32") || !wanted("stats")) return;
    World world(rule, storage_of(kinds[4], rule), {{n}, 0, 1});
    row("adamw in fp32, averaged, gradients zeroed, with pass 1", n, 0.0, [&] {
      world.settings(true, true);
      must(backend().stats(world.job, {}, 2, nullptr));
      world.settings(true, false);
      must(backend().step(cuda::Class::fp32, rule.index, false, world.job, 2, nullptr));
    });
  }

  void others() {
    const RuleUnderTest sgd = rule_under_test<rules::SGD>(0);
    for (Kind kind : plain) {
      kind.ema = true;
      World world(sgd, storage_of(kind, sgd), {{n}, 0, 1});
      world.settings(true, true);
      world.job.weight = 0.25;
      const double one = static_cast<double>(bytes(kind.param)), wide = kind.param == Format::fp64 ? 8.0 : 4.0;
      if (!wanted("stats")) continue;
      row(std::string("pass 1 in ") + kind.name, n, one, [&] { must(backend().stats(world.job, {}, 2, nullptr)); });
      row(std::string("averages of ") + kind.name, n, one + 2.0 * wide,
          [&] { must(backend().average(world.job, 2, nullptr)); });
    }
  }
};

// `first` measures what is no step.
template <class... Rules, class First>
int print_traffic(rules::List<Rules...>, First first) {
  Meter meter;
  pytrain_simt_order(0, 0);
  std::printf("{");
  meter.others();
  first(meter);
  int index = 0;
  (meter.rule(rule_under_test<Rules>(index++)), ...);
  std::printf("\n}\n");
  return checks.failed ? 1 : 0;
}
