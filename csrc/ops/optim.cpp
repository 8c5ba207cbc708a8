// The optimizer ops. A public one a rule, whose schema is made from the rule's own facts:
//   pytrain::adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq,
//                   Tensor(d!)[] step, Tensor control, int[] groups) -> ()
// and a private pair that keeps the states between steps. Both run Table::step.
#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "cpu/dispatch.h"
#include "ops/table.h"
#include "rules/all.h"

namespace pytrain::ops {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

template <class... Rules>
std::array<RuleInfo, sizeof...(Rules)> infos(PT_ISA::rules::List<Rules...>) {
  return {RuleInfo{Rules::name, Rules::states, PT_ISA::rules::state_count<Rules>(), Rules::counts}...};
}

const auto& all_rules() {
  static const auto rules = infos(PT_ISA::rules::All{});
  return rules;
}
constexpr int n_rules = PT_ISA::rules::All::size;
static_assert(n_rules <= cpu::max_rules);

std::string schema(const RuleInfo& rule) {
  char alias = 'a';
  const auto list = [&](const char* name) {
    return std::string("Tensor(") + alias++ + "!)[] " + name + ", ";
  };
  std::string text = std::string(rule.name) + "_(" + list("params") + "Tensor[] grads, ";
  for (int s = 0; s < rule.n_states; ++s) text += list(rule.states[s]);
  if (rule.counts) text += list("step");
  return text + "Tensor control, int[] groups) -> ()";
}

View control_view(AtenTensorHandle control, const char* op) {
  const View v = view(control, false);
  STD_TORCH_CHECK(v.usable && v.contiguous && v.format == Format::fp64 &&
                      v.numel >= core::control_head + core::control_row &&
                      (v.numel - core::control_head) % core::control_row == 0,
                  op, "_: control must be a contiguous float64 CPU tensor of ", core::control_head, " + ",
                  core::control_row, " x (param groups) elements");
  return v;
}

// The public op of rule number R: a table that lives for one step.
template <int R>
void step_once(StableIValue* stack, uint64_t, uint64_t) {
  const RuleInfo& rule = all_rules()[R];
  int at = 0;
  const TensorList params(stack[at++]), grads(stack[at++]);
  std::vector<std::unique_ptr<TensorList>> lists;
  for (int s = 0; s < rule.n_states; ++s) lists.push_back(std::make_unique<TensorList>(stack[at++]));
  std::vector<Handle> steps;
  if (rule.counts) {
    const TensorList list(stack[at++]);
    for (int64_t k = 0; k < list.size(); ++k) steps.push_back(share(list[k]));
  }
  const Handle control(to<AtenTensorHandle>(stack[at++]));
  auto groups = to<std::vector<int64_t>>(stack[at++]);
  STD_TORCH_CHECK(static_cast<int64_t>(groups.size()) == params.size(), rule.name, "_: groups has ", groups.size(),
                  " entries, params has ", params.size());
  std::vector<Handle> states;
  for (int64_t k = 0; k < params.size(); ++k) {
    for (int s = 0; s < rule.n_states; ++s) {
      STD_TORCH_CHECK(lists[s]->size() == params.size(), rule.name, "_: ", rule.states[s], " has ", lists[s]->size(),
                      " tensors, params has ", params.size());
      states.push_back(share((*lists[s])[k]));
    }
  }
  Table table(R, rule, std::move(states), std::move(steps), std::move(groups));
  table.step(params, grads, {}, control_view(control.get(), rule.name), true, true);
}

// Tables live here under a number, because the stable ABI has no objects of ours. Never destroyed: at the process's
// end libtorch may go first.
struct Tables {
  std::mutex lock;
  std::unordered_map<int64_t, std::shared_ptr<Table>> by_id;
  int64_t next = 1;
};
Tables& tables() {
  static Tables* const all = new Tables;
  return *all;
}

std::vector<Handle> handles(const TensorList& list) {
  std::vector<Handle> out;
  out.reserve(list.size());
  for (int64_t k = 0; k < list.size(); ++k) out.push_back(share(list[k]));
  return out;
}

// _table(str rule, Tensor[] states, Tensor[] steps, int[] groups) -> int
void make_table(StableIValue* stack, uint64_t, uint64_t) {
  const auto name = to<std::string>(stack[0]);
  const TensorList states(stack[1]), steps(stack[2]);
  auto groups = to<std::vector<int64_t>>(stack[3]);
  const auto& rules = all_rules();
  const auto rule = std::find_if(rules.begin(), rules.end(), [&](const RuleInfo& r) { return name == r.name; });
  STD_TORCH_CHECK(rule != rules.end(), "_table: there is no rule '", name, "'");
  auto table = std::make_shared<Table>(static_cast<int>(rule - rules.begin()), *rule, handles(states), handles(steps),
                                       std::move(groups));
  const std::lock_guard<std::mutex> lock(tables().lock);
  tables().by_id.emplace(tables().next, std::move(table));
  stack[0] = from(tables().next++);
}

// _table_free(int table) -> ()
void free_table(StableIValue* stack, uint64_t, uint64_t) {
  std::shared_ptr<Table> last;  // let go outside the lock
  const std::lock_guard<std::mutex> lock(tables().lock);
  const auto found = tables().by_id.find(to<int64_t>(stack[0]));
  if (found == tables().by_id.end()) return;
  last = std::move(found->second);
  tables().by_id.erase(found);
}

std::shared_ptr<Table> find_table(int64_t id) {
  const std::lock_guard<std::mutex> lock(tables().lock);
  const auto found = tables().by_id.find(id);
  STD_TORCH_CHECK(found != tables().by_id.end(), "_table_step: there is no table ", id);
  return found->second;
}

// _table_step(int table, Tensor(a!)[] params, Tensor[] grads, int[] rows, Tensor control, bool write, bool strict)
//   -> int
void step_table(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList params(stack[1]), grads(stack[2]);
  const auto rows = to<std::vector<int64_t>>(stack[3]);
  const Handle control(to<AtenTensorHandle>(stack[4]));
  const bool write = to<bool>(stack[5]), strict = to<bool>(stack[6]);
  const View block = control_view(control.get(), "_table_step");
  stack[0] = from(find_table(to<int64_t>(stack[0]))->step(params, grads, rows, block, write, strict));
}

// _table_step_pairs(int table, Tensor pairs, int n, int[] rows, Tensor control, bool write) -> int
// pairs: the memory of n Pairs, as int64, that the caller has just filled in and whose tensors it keeps alive.
void step_table_pairs(StableIValue* stack, uint64_t, uint64_t) {
  const Handle pairs(to<AtenTensorHandle>(stack[1])), control(to<AtenTensorHandle>(stack[4]));
  const int64_t n = to<int64_t>(stack[2]);
  const auto rows = to<std::vector<int64_t>>(stack[3]);
  const View memory = view(pairs.get(), false), block = control_view(control.get(), "_table_step_pairs");
  constexpr int64_t words = sizeof(Pair) / sizeof(int64_t);
  STD_TORCH_CHECK(memory.usable && memory.contiguous && memory.numel >= n * words,
                  "_table_step_pairs: pairs has ", memory.numel, " elements, too few for n = ", n);
  const auto table = find_table(to<int64_t>(stack[0]));
  stack[0] = from(table->step(static_cast<const Pair*>(memory.data), n, rows, block, to<bool>(stack[5])));
}

// _isa(str level) -> str: the level in use, after changing it to `level` if that is not empty.
void isa(StableIValue* stack, uint64_t, uint64_t) {
  const auto level = to<std::string>(stack[0]);
  if (!level.empty()) cpu::set_isa(cpu::choose_isa(level));
  stack[0] = from(std::string(cpu::isa_name(cpu::current_isa())));
}

template <int... R>
void register_rules(torch::stable::detail::StableLibrary& m, std::integer_sequence<int, R...>) {
  (m.impl((std::string(all_rules()[R].name) + "_").c_str(), &step_once<R>), ...);
}

}  // namespace
}  // namespace pytrain::ops

STABLE_TORCH_LIBRARY(pytrain, m) {
  for (const auto& rule : pytrain::ops::all_rules()) m.def(pytrain::ops::schema(rule).c_str());
  m.def("_table(str rule, Tensor[] states, Tensor[] steps, int[] groups) -> int");
  m.def("_table_free(int table) -> ()");
  m.def(
      "_table_step(int table, Tensor(a!)[] params, Tensor[] grads, int[] rows, Tensor control, bool write, bool strict)"
      " -> int");
  m.def("_table_step_pairs(int table, Tensor pairs, int n, int[] rows, Tensor control, bool write) -> int");
  m.def("_isa(str level) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(pytrain, CPU, m) {
  pytrain::ops::register_rules(m, std::make_integer_sequence<int, pytrain::ops::n_rules>{});
}

// The private ops look at devices and layouts themselves, so that Python hears of a misfit instead of a dispatch error.
STABLE_TORCH_LIBRARY_IMPL(pytrain, CompositeExplicitAutograd, m) {
  m.impl("_table", &pytrain::ops::make_table);
  m.impl("_table_free", &pytrain::ops::free_table);
  m.impl("_table_step", &pytrain::ops::step_table);
  m.impl("_table_step_pairs", &pytrain::ops::step_table_pairs);
  m.impl("_isa", &pytrain::ops::isa);
}
