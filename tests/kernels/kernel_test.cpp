// The kernels without torch: on every instruction set the bits of a slow reference, and not a byte outside.
//
// Each rule steps segments of two groups in each kind of storage, whole and in pieces that end anywhere, between
// sentinels; the plain formats at every count and misalignment too.
// Arguments: the levels to run (default: all that this machine has); "few" for fewer counts.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/dispatch.h"
#include "kinds.h"
#include "problem.h"
#include "reference.h"

using namespace pytrain::cpu;  // a test of this namespace

namespace {

Checks checks;

// As Table::run in csrc/ops/table.cpp; the cuts say where the pieces end.
void step(const RuleUnderTest& rule, Problem& problem, std::vector<int64_t> cuts) {
  const RuleFunctions& functions = current_kernels().rules[rule.index];
  const bool needs = functions.sums || functions.advance || problem.storage.needs_extras(functions.states);
  const auto n = static_cast<int64_t>(problem.segments.size());
  const Job job{&functions,
                problem.storage,
                problem.segments.data(),
                needs ? problem.extras.data() : nullptr,
                problem.offsets.data(),
                n,
                &rule.control.head,
                problem.partial_offsets.data(),
                problem.partials.data()};
  cuts.push_back(problem.total);
  const auto in_pieces = [&](void (*kernel)(const Job&, int64_t, int64_t)) {
    int64_t begin = 0;
    for (const int64_t cut : cuts) {
      const int64_t end = std::max(begin, std::min(cut, problem.total));
      kernel(job, begin, end);
      begin = end;
    }
  };
  if (functions.sums) in_pieces(current_kernels().measure);
  for (size_t k = 0; k < problem.segments.size() && functions.sums; ++k) {
    const int64_t blocks = (problem.segments[k].numel + block - 1) / block;
    for (int i = 0; i < functions.sums; ++i) {
      double sum = 0.0;
      for (int64_t b = 0; b < blocks; ++b) sum += problem.partials[problem.partial_offsets[k] + b * functions.sums + i];
      problem.extras[k].sums[i] = sum;
    }
  }
  in_pieces(current_kernels().step);
  for (size_t k = 0; k < problem.segments.size() && functions.advance; ++k) {
    const Segment& segment = problem.segments[k];
    Extra& extra = problem.extras[k];
    functions.advance(rule.control.rows[segment.group], segment.step, extra.scalars, extra.sums);
  }
}

struct Tester {
  RuleUnderTest rule;
  Apply<float> apply32;
  Apply<double> apply64;
  std::vector<Isa> levels;
  bool few;

  void check_problem(const Kind& kind, const std::vector<int64_t>& counts, int offset,
                     const std::vector<std::vector<int64_t>>& splits) {
    rule.control.head.clip_value = kind.clip_value;
    const Storage storage = storage_of(kind, rule);
    Problem expected(rule, storage, counts, offset);
    reference_step(rule, apply32, apply64, expected);
    for (const Isa level : levels) {
      set_isa(level);
      for (const std::vector<int64_t>& cuts : splits) {
        Problem problem(rule, storage, counts, offset);
        step(rule, problem, cuts);
        const std::string what = std::string(rule.name) + " in " + kind.name + ", offset " + std::to_string(offset) +
                                 ", " + isa_name(level) + " in " + std::to_string(cuts.size() + 1) +
                                 " pieces, first count";
        checks.check(problem.same(expected), what.c_str(), static_cast<double>(counts[0]));
      }
    }
  }

  void check_all() {
    const int before = checks.failed;
    for (const Kind& kind : plain) {
      for (int64_t n = 0; n <= 70; n += few ? 14 : 1) {
        for (int offset = 0; offset < 4; offset += few ? 3 : 1) {
          check_problem(kind, {n, 0, 70 - n, 3}, offset, {{}, {20, 45}});
        }
      }
    }
    // Pieces that end within a block, at one and just beside one.
    std::vector<int64_t> counts = {900, 1, 4700};
    if (!few) counts = {5000, 1, 8900, 0, 4096};
    for (const Kind& kind : kinds) {
      check_problem(kind, counts, 1, {{}, {1, 900, 901, 902, 4095, 4096, 4996, 4997, 5001, 9097, 9098, 9900}});
    }
    std::printf("%-26s %s\n", rule.name, checks.failed == before ? "ok" : "FAILED");
  }
};

template <class... Rules>
void check_rules(rules::List<Rules...>, const std::vector<Isa>& levels, bool few) {
  int rule = 0;
  (Tester{rule_under_test<Rules>(rule++), &apply_any<Rules, float>, &apply_any<Rules, double>, levels, few}.check_all(),
   ...);
}

// The partials of all blocks, taken in pieces.
std::vector<double> take_stats(const Problem& problem, const std::vector<int64_t>& cuts) {
  std::vector<int64_t> starts;
  int64_t blocks = 0;
  for (const Segment& segment : problem.segments) {
    starts.push_back(blocks);
    blocks += (segment.numel + block - 1) / block;
  }
  std::vector<double> partials(blocks + 1, -1.0);
  const Job job{nullptr, problem.storage, problem.segments.data(), nullptr, problem.offsets.data(),
                static_cast<int64_t>(problem.segments.size()), nullptr, starts.data(), partials.data()};
  int64_t begin = 0;
  for (const int64_t cut : cuts) {
    current_kernels().stats(job, begin, cut);
    begin = cut;
  }
  current_kernels().stats(job, begin, problem.total);
  return partials;
}

// Sums of squares are right, the same for every level and any pieces, and stay within their memory.
void check_sums(const std::vector<Isa>& levels) {
  const RuleUnderTest rule = rule_under_test<rules::SGD>(0);
  for (const Kind& kind : plain) {
    for (const int64_t n : {0, 1, 15, 16, 17, 511, 512, 513, 4095, 4096, 4097, 9000}) {
      const Problem problem(rule, storage_of(kind, rule), {70, n, 5000}, 1);
      std::vector<long double> exact;
      for (const Segment& segment : problem.segments) {
        for (int64_t i = 0; i < segment.numel; ++i) {
          if (i % block == 0) exact.push_back(0.0L);
          const long double g = get(kind.param, segment.grad, i);
          exact.back() += g * g;
        }
      }
      std::vector<double> first;
      for (const Isa level : levels) {
        set_isa(level);
        const std::vector<double> whole = take_stats(problem, {});
        const std::vector<double> pieces = take_stats(problem, {1, 70, 71, 4167, 5000});
        if (first.empty()) first = whole;
        const std::string what = std::string("sums of squares in ") + kind.name + ", " + isa_name(level);
        checks.check(whole == pieces && whole == first && whole.back() == -1.0, what.c_str(), static_cast<double>(n));
        for (size_t b = 0; b < exact.size(); ++b) {
          const long double apart = static_cast<long double>(whole[b]) - exact[b];
          checks.check(std::fabs(static_cast<double>(apart)) <= 1e-14 * whole[b], what.c_str(), static_cast<double>(n));
        }
      }
    }
  }
}

// An inf or a nan of either sign shows wherever it stands, and only in the block that it belongs to. The largest finite
// number does not, though its square may be inf.
void check_bad(const std::vector<Isa>& levels) {
  const RuleUnderTest rule = rule_under_test<rules::SGD>(0);
  for (const Kind& kind : plain) {
    const double largest = kind.param == fp64 ? 0x1.fffffffffffffp1023 : kind.param == fp32 ? 0x1.fffffep127
                           : kind.param == bf16 ? 0x1.fep127 : 65504.0;
    for (const Isa level : levels) {
      set_isa(level);
      for (const int64_t bad : {0, 1, 15, 16, 33, 50, 69, 70, 4100, 5060, 5069}) {
        Problem problem(rule, storage_of(kind, rule), {70, 0, 5000}, 1);
        const size_t of = bad < 70 ? 0 : bad < 70 + block ? 1 : 2;
        for (const double value : {0.0, largest, -largest, HUGE_VAL, -HUGE_VAL, std::nan("")}) {
          put(kind.param, problem.segments[bad < 70 ? 0 : 2].grad, bad < 70 ? bad : bad - 70, value);
          const std::vector<double> partials = take_stats(problem, {});
          for (size_t b = 0; b < 3; ++b) {
            const bool shows = std::isnan(partials[b]);
            checks.check(shows == (b == of && !std::isfinite(value)), "bad gradients", static_cast<double>(bad));
          }
        }
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Isa> levels;
  bool few = false;
  try {
    for (int i = 1; i < argc; ++i) {
      if (!std::strcmp(argv[i], "few")) {
        few = true;
      } else {
        levels.push_back(choose_isa(argv[i]));
      }
    }
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
  for (int level = 0; argc == 1 + few && level < isa_count; ++level) {
    if (isa_supported(static_cast<Isa>(level))) levels.push_back(static_cast<Isa>(level));
  }
  for (const Isa level : levels) std::printf("level %s\n", isa_name(level));
  check_sums(levels);
  check_bad(levels);
  check_rules(rules::All{}, levels, few);
  return checks.finish();
}
