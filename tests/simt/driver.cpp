// The kernels of csrc/cuda without torch and without a GPU: every launch against a plain reference.
//
// Arguments: "forward" for one order of blocks and threads instead of four, "few" for fewer cases, "traffic" for the
// bytes that are moved instead; and which areas to test: fp32, fp64, mixed (steps of these classes), stats, control,
// copy.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "core/scaler.h"
#include "simt/copies.h"
#include "simt/steps.h"
#include "simt/traffic.h"

namespace {

using pytrain::core::Policy;
using pytrain::core::Scaler;

// The sums of the squares of each group's gradients, the first bad one, and what else pass 1 leaves.
struct Stats {
  const Kind& kind;
  Shape shape;
  bool fresh;
  // Element `at` of parameter `of` becomes `value`, and the first one of `also`.
  int64_t of = -1, at = 0;
  double value = 0.0;
  double scale = 1.0;  // of all gradients
  int64_t also = -1;

  void check() const {
    const RuleUnderTest rule = rule_under_test<rules::SGD>(0);
    std::vector<double> first;
    for (int o = 0; o < n_orders; ++o) {
      pytrain_simt_order(orders[o].order, orders[o].seed);
      World world(rule, storage_of(kind, rule), shape), before(rule, storage_of(kind, rule), shape);
      for (World* w : {&world, &before}) change(*w);
      for (int64_t g = 0; g < world.groups(); ++g) world.row(g).sumsq = 3.0;
      world.head().first_bad = 9.0;
      world.settings(shape.groups <= cuda::Settings::max_rows, fresh);
      must(backend().stats(world.job, {}, 3, nullptr));
      const std::string what = std::string("statistics in ") + kind.name + ", " + orders[o].name;
      checks.check(world.same_memory(before), (what + ": memory").c_str());
      std::vector<double> found = {world.head().found_inf, world.head().first_bad};
      for (int64_t g = 0; g < world.groups(); ++g) found.push_back(world.row(g).sumsq);
      checks.check((o == 0 || found == first) && *world.job.ticket == 0, (what + ": the same in any order").c_str());
      if (o == 0) compare(world, what);
      first = found;
    }
  }

  void change(World& world) const {
    for (size_t k = 0; k < world.segments.size(); ++k) {
      const Segment& s = world.segments[k];
      for (int64_t i = 0; i < s.numel && scale != 1.0; ++i) {
        put(kind.param, s.grad, i, get(kind.param, s.grad, i) * scale);
      }
    }
    if (of >= 0) put(kind.param, world.segments[of].grad, at, value);
    if (also >= 0) put(kind.param, world.segments[also].grad, 0, value);
  }

  void compare(World& world, const std::string& what) const {
    const bool bad = of >= 0 && !std::isfinite(value);
    const double index = bad ? static_cast<double>(world.extras[of].index) : -1.0;
    const double earlier = fresh ? -1.0 : 9.0;
    const double expected = !bad ? earlier : earlier < 0.0 ? index : std::min(index, earlier);
    checks.check(world.head().found_inf == (bad ? 1.0 : 0.0), (what + ": found_inf").c_str(), world.head().found_inf);
    checks.check(world.head().first_bad == expected, (what + ": first_bad").c_str(), world.head().first_bad);
    const bool begun = world.row(0).clip_coef == 1.0 && world.head().clip_value == 0.0;
    checks.check(begun || !fresh, (what + ": begun").c_str());
    for (int64_t g = 0; g < world.groups(); ++g) {
      long double sum = 0.0L;
      for (size_t k = 0; k < world.segments.size(); ++k) {
        const auto number = static_cast<int64_t>(k);
        if (world.segments[k].group != g || (bad && (number == of || number == also))) continue;
        for (int64_t i = 0; i < world.segments[k].numel; ++i) {
          const long double x = get(kind.param, world.segments[k].grad, i);
          sum += x * x;
        }
      }
      const long double apart = std::fabs(static_cast<long double>(world.row(g).sumsq) - (fresh ? 0.0L : 3.0L) - sum);
      const double bound = 0x1p-42;  // that of what a thread adds up is 2^-44
      checks.check(apart <= bound * sum + (fresh ? 0.0L : 1e-15L), (what + ": sum of squares").c_str(),
                   static_cast<double>(apart / sum));
    }
  }
};

void check_stats() {
  const int64_t many = cuda::few_chunks * cuda::chunk;
  for (const Kind& kind : plain) {
    for (const bool fresh : {true, false}) {
      const Shape sizes{{0, 1, 3, 255, 256, 257, 4095, 4096, 4097, 9000}, 0, 3};
      Shape off = sizes, tiny{{}, 0, 2}, rows = sizes;
      off.shifted = 1u << of_grad;
      rows.groups = cuda::Settings::max_rows + 1;
      for (int64_t k = 0; k < 600; ++k) tiny.counts.push_back(k % 5);
      Stats{kind, sizes, fresh}.check();
      Stats{kind, off, fresh}.check();
      Stats{kind, tiny, fresh}.check();
      if (!fresh) Stats{kind, rows, false}.check();
      if (!few || fresh == (kind.param == fp32)) Stats{kind, {{7, many + 1, 0, many + 9000}, 0, 2}, fresh}.check();
      if (!few || kind.param == fp32) Stats{kind, {{many, 1}, 0, 2}, fresh}.check();
      Stats{kind, {{0, 0}, 0, 1}, fresh}.check();
    }
    for (const int64_t at : {0, 1, 255, 2048, 4095, 4096, 8999}) {
      for (const double bad : {HUGE_VAL, -HUGE_VAL, std::nan("")}) {
        if (few && (at > 255) != (bad > 0.0)) continue;
        Stats{kind, {{5, 9000, 300}, 0, 2}, at % 2 == 0, 1, at, bad}.check();
      }
    }
    Stats{kind, {{700, 4100, 1}, 0, 2}, false, 2, 0, HUGE_VAL}.check();
    Stats{kind, {{10, 700, 20, 20, 9}, 0, 2}, true, 1, 3, HUGE_VAL, 1.0, 3}.check();
  }
  for (const double scale : {1e-30, 1e25, 1e19}) Stats{plain[0], {{700, 4100}, 0, 2}, true, -1, 0, 0.0, scale}.check();
}

void check_averages() {
  const RuleUnderTest rule = rule_under_test<rules::SGD>(0);
  for (Kind kind : plain) {
    kind.ema = true;
    for (const double weight : {0.3, 0.75, 1.0}) {
      for (int o = 0; o < n_orders; ++o) {
        pytrain_simt_order(orders[o].order, orders[o].seed);
        const Shape shape{{0, 1, 257, 4097, 9000}, o % 2 ? 0u : 1u << of_ema, 1};
        World world(rule, storage_of(kind, rule), shape), expected(rule, storage_of(kind, rule), shape);
        world.job.weight = weight;
        must(backend().average(world.job, 3, nullptr));
        for (size_t k = 0; k < expected.segments.size(); ++k) {
          for (int64_t i = 0; i < expected.segments[k].numel; ++i) {
            const double p = get(kind.param, expected.segments[k].param, i);
            if (kind.param == fp64) {
              double& average = static_cast<double*>(expected.extras[k].ema)[i];
              average = rules::lerp(average, p, weight);
            } else {
              float& average = static_cast<float*>(expected.extras[k].ema)[i];
              average = rules::lerp(average, static_cast<float>(p), static_cast<float>(weight));
            }
          }
        }
        checks.check(world.same_memory(expected), "averages outside a step", weight);
      }
    }
  }
}

// Numbers that the host writes to the device.
void check_uploads() {
  for (const int64_t n : {int64_t{0}, int64_t{1}, int64_t{127}, int64_t{129}, cuda::Piece::max_words}) {
    cuda::Piece piece{};
    piece.n = n;
    for (int64_t i = 0; i < cuda::Piece::max_words; ++i) piece.words[i] = 7 * i + 1;
    Arena got(1 << 14, false), expected(1 << 14, false);
    void* const to = got.take(n * 8);
    void* const wanted = expected.take(n * 8);
    must(backend().upload(piece, to, nullptr));
    if (n) std::memcpy(wanted, piece.words, n * 8);
    checks.check(got == expected, "upload", static_cast<double>(n));
  }
}

// Control blocks on a device, and lists of words about them by value or there.
struct Blocks {
  Arena memory{1 << 16, false};
  std::vector<pytrain::core::Control*> controls;
  std::vector<int64_t> rows;

  explicit Blocks(double bad) {
    for (const int64_t n : {2, 1, 3}) {
      auto* const control = static_cast<pytrain::core::Control*>(
          memory.take(sizeof(pytrain::core::Control) + n * sizeof(pytrain::core::GroupRow)));
      *control = {0.5, 0.0, 0.0, 0.0, -1.0};
      for (int64_t r = 0; r < n; ++r) control->rows()[r].sumsq = static_cast<double>(n + 3 * r);
      controls.push_back(control);
      rows.push_back(n);
    }
    if (bad >= 0.0) controls[1]->found_inf = 1.0;
    if (bad >= 0.0) controls[1]->first_bad = bad;
  }
  void words(const std::vector<int64_t>& all, bool by_value, cuda::Words& to) {
    to.n = static_cast<int64_t>(all.size());
    if (by_value) {
      std::copy(all.begin(), all.end(), to.here);
    } else {
      void* const room = memory.take(all.size() * 8);
      std::memcpy(room, all.data(), all.size() * 8);
      to.many = static_cast<const int64_t*>(room);
    }
  }
  std::vector<int64_t> addresses() const {
    std::vector<int64_t> all;
    for (auto* const control : controls) all.push_back(static_cast<int64_t>(reinterpret_cast<std::uintptr_t>(control)));
    return all;
  }
  bool same(const Blocks& other) const {
    bool all = true;
    for (size_t i = 0; i < controls.size(); ++i) {
      const size_t bytes = sizeof(pytrain::core::Control) + rows[i] * sizeof(pytrain::core::GroupRow);
      all = all && !std::memcmp(controls[i], other.controls[i], bytes);
    }
    return all;
  }
};

void check_control() {
  const std::vector<int64_t> scaled = {1, 0, 1}, groups = {0, 1, -1, 0, 0, 1};
  const double max_norms[] = {0.25, 100.0};
  for (const double bad : {-1.0, 4.0}) {
    for (const bool by_value : {true, false}) {
      Blocks got(bad), expected(bad);
      std::vector<int64_t> all = got.addresses();
      for (const auto& list : {got.rows, scaled, groups}) all.insert(all.end(), list.begin(), list.end());
      for (const double& norm : max_norms) {
        int64_t bits;
        std::memcpy(&bits, &norm, sizeof bits);
        all.push_back(bits);
      }
      cuda::Settle job{};
      got.words(all, by_value, job.words);
      auto* const scale = static_cast<float*>(got.memory.take(sizeof(float)));
      *scale = 1024.0f;
      job.scale = scale;
      job.n_controls = 3;
      job.n_rows = 6;
      job.n_groups = 2;
      job.room = static_cast<double*>(got.memory.take(4 * sizeof(double)));
      must(backend().settle(job, nullptr));
      double room[4];
      const std::vector<int64_t> addresses = expected.addresses();
      pytrain::core::settle({3, 2, addresses.data(), got.rows.data(), scaled.data(), groups.data(), max_norms, room},
                            1024.0);
      checks.check(got.same(expected), "settle", bad);

      const Policy policy{2.0, 0.5, 1.0, 1.0, 1.0, 65536.0, 0.0, 0.0};
      Scaler reference{1024.0f, 0.0f, 1.0f, 0.0f, -1.0f, -1.0f};
      cuda::ScalerUpdate update{};
      got.words(got.addresses(), by_value, update.words);
      update.state = static_cast<Scaler*>(got.memory.take(sizeof(Scaler)));
      *update.state = reference;
      update.policy = policy;
      update.n_controls = 3;
      must(backend().update_scaler(update, nullptr));
      pytrain::core::update(reference, policy, addresses.data(), 3);
      checks.check(!std::memcmp(update.state, &reference, sizeof reference), "scaler", bad);
      checks.check(update.state->scale == (bad < 0.0 ? 2048.0f : 512.0f), "scale", update.state->scale);
    }
  }
}

// A whole step of one table: pass 1 that settles and pass 2 that moves the scale, against launches of their own.
struct Folded {
  const Kind& kind;
  Shape shape;
  int rule;
  double bad;     // of one gradient; 0: none
  bool scaled, by_value;

  struct Step {
    World world;
    Arena memory{1 << 16, false};
    Scaler* scaler;
    cuda::Settle settle{};

    Step(const RuleUnderTest& rule, const Storage& storage, const Folded& of) : world(rule, storage, of.shape) {
      if (of.bad != 0.0) put(of.kind.param, world.segments[1].grad, 5, of.bad);
      scaler = static_cast<Scaler*>(memory.take(sizeof(Scaler)));
      *scaler = {1024.0f, 0.0f, 1.0f, 0.0f, -1.0f, -1.0f};
      world.settings(true, true);
      const int64_t n = world.groups(), n_groups = 2;
      std::vector<int64_t> words = {static_cast<int64_t>(reinterpret_cast<std::uintptr_t>(world.job.control)), n,
                                    of.scaled};
      for (int64_t g = 0; g < n; ++g) words.push_back(g % 3 - 1);
      for (const double norm : {0.25, 100.0}) {
        int64_t bits;
        std::memcpy(&bits, &norm, sizeof bits);
        words.push_back(bits);
      }
      settle.words.n = static_cast<int64_t>(words.size());
      void* const many = memory.take(words.size() * sizeof(int64_t));
      std::memcpy(many, words.data(), words.size() * sizeof(int64_t));
      if (!of.by_value) settle.words.many = static_cast<const int64_t*>(many);
      if (of.by_value) std::copy(words.begin(), words.end(), settle.words.here);
      settle.scale = of.scaled ? &scaler->scale : nullptr;
      settle.n_controls = 1;
      settle.n_rows = n;
      settle.n_groups = n_groups;
      settle.room = static_cast<double*>(memory.take(2 * n_groups * sizeof(double)));
      settle.moved = static_cast<Scaler*>(memory.take(sizeof(Scaler)));
    }
  };

  void check(const RuleUnderTest& of_rule) const {
    const Policy policy{2.0, 0.5, 1.0, 1.0, 1.0, 65536.0, 0.0, 0.0};
    const Storage storage = storage_of(kind, of_rule);
    const cuda::Class type = class_of(storage);
    for (int o = 0; o < n_orders; ++o) {
      pytrain_simt_order(orders[o].order, orders[o].seed);
      Step one(of_rule, storage, *this), apart(of_rule, storage, *this);
      one.settle.scaler = one.scaler;
      one.settle.policy = policy;
      const Scaler before = *one.scaler;
      must(backend().stats(one.world.job, one.settle, 3, nullptr));
      checks.check(!std::memcmp(one.scaler, &before, sizeof before), "pass 1 leaves the scale");
      must(backend().stats(apart.world.job, {}, 3, nullptr));
      must(backend().settle(apart.settle, nullptr));
      const std::string what = std::string("a whole step in ") + kind.name + ", " + orders[o].name;
      checks.check(one.world.same_numbers(apart.world), (what + ": settled").c_str(), bad);
      for (Step* step : {&one, &apart}) step->world.settings(true, false);
      one.world.job.scaler = one.scaler;
      one.world.job.moved = one.settle.moved;
      for (Step* step : {&one, &apart}) {
        if (of_rule.n_sums) must(backend().step(type, rule, true, step->world.job, 3, nullptr));
        must(backend().step(type, rule, false, step->world.job, 3, nullptr));
      }
      cuda::ScalerUpdate update{};
      update.words.n = 1;
      update.words.here[0] = apart.settle.words.many ? apart.settle.words.many[0] : apart.settle.words.here[0];
      update.state = apart.scaler;
      update.policy = policy;
      update.n_controls = 1;
      must(backend().update_scaler(update, nullptr));
      checks.check(one.world.same_memory(apart.world) && one.world.same_numbers(apart.world), what.c_str(), bad);
      checks.check(!std::memcmp(one.scaler, apart.scaler, sizeof(Scaler)), (what + ": scaler").c_str(), bad);
      checks.check(one.scaler->scale == (bad == 0.0 ? 2048.0f : 512.0f), (what + ": scale").c_str(), bad);
      checks.check(one.world.head().found_inf == (bad == 0.0 ? 0.0 : 1.0), (what + ": skipped").c_str(), bad);
    }
  }
};

template <class Rule>
void check_folded(int rule) {
  const RuleUnderTest of_rule = rule_under_test<Rule>(rule);
  for (const Kind* kind : {&kinds[0], &kinds[1], &kinds[2]}) {
    if (!wanted(storage_of(*kind, of_rule))) continue;
    for (const double bad : {0.0, HUGE_VAL}) {
      Folded{*kind, {{300, 5000, 0, 9000}, 0, 5}, rule, bad, true, false}.check(of_rule);
      Folded{*kind, {{7, 9, 4097}, 0, 2}, rule, bad, bad == 0.0, true}.check(of_rule);
    }
  }
}

template <class... Rules>
void check_all_folded(rules::List<Rules...>) {
  int rule = 0;
  const auto one = [&](auto* of, int number) {
    using Rule = std::remove_pointer_t<decltype(of)>;
    if (std::is_same_v<Rule, rules::AdamW> || rules::sum_count<Rule>() > 0 || !few) check_folded<Rule>(number);
  };
  (one(static_cast<Rules*>(nullptr), rule++), ...);
}

}  // namespace

int main(int argc, char** argv) {
  bool traffic = false;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "few") {
      few = true;
      n_orders = std::min(n_orders, 3);
    } else if (word == "forward") {
      n_orders = 1;
    } else if (word == "traffic") {
      traffic = true;
    } else {
      areas.push_back(word);
    }
  }
  if (traffic) return print_traffic(rules::All{}, [](Meter& meter) {
    if (wanted("copy")) meter_copies(meter);
  });
  if (wanted("control")) check_uploads();
  if (wanted("control")) check_control();
  if (wanted("stats")) check_averages();
  if (wanted("stats")) check_stats();
  if (wanted("copy")) check_copies();
  check_all_folded(rules::All{});
  check_rules(rules::All{});
  if (simt::watching) checks.check(simt::conflicts() == 0, "no races", static_cast<double>(simt::conflicts()));
  return checks.finish();
}
