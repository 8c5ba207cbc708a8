// The optimizer ops. A public one a rule, whose schema is made from the rule's own facts:
//   pytrain::adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq,
//                   Tensor(d!)[] step, Tensor control, int[] groups) -> ()
// and a private pair that keeps the states between steps. Both run Table::step.
#include <algorithm>
#include <array>
#include <memory>
#include <optional>
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
  return {RuleInfo{Rules::name, Rules::states, PT_ISA::rules::state_count<Rules>(),
                   PT_ISA::rules::Scalars<Rules>::names, PT_ISA::rules::scalar_count<Rules>(),
                   PT_ISA::rules::sum_count<Rules>(), Rules::counts}...};
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
  for (int s = 0; s < rule.n_scalars; ++s) text += list(rule.scalars[s]);
  if (rule.counts) text += list("step");
  return text + "Tensor control, int[] groups) -> ()";
}

std::vector<Handle> handles(const TensorList& list) {
  std::vector<Handle> out;
  out.reserve(list.size());
  for (int64_t k = 0; k < list.size(); ++k) out.push_back(share(list[k]));
  return out;
}

// The public op of rule number R: a table that lives for one step, with states in the parameters' dtype.
template <int R>
void step_once(StableIValue* stack, uint64_t, uint64_t) {
  const RuleInfo& rule = all_rules()[R];
  int at = 0;
  const TensorList params(stack[at++]), grads(stack[at++]);
  // Lists of one tensor a parameter, handed over row by row.
  const auto rows_of = [&](const char* const* names, int count) {
    std::vector<std::unique_ptr<TensorList>> lists;
    for (int s = 0; s < count; ++s) lists.push_back(std::make_unique<TensorList>(stack[at++]));
    std::vector<Handle> rows;
    for (int64_t k = 0; k < params.size(); ++k) {
      for (int s = 0; s < count; ++s) {
        STD_TORCH_CHECK(lists[s]->size() == params.size(), rule.name, "_: ", names[s], " has ", lists[s]->size(),
                        " tensors, params has ", params.size());
        rows.push_back(share((*lists[s])[k]));
      }
    }
    return rows;
  };
  Kept kept;
  kept.states = rows_of(rule.states, rule.n_states);
  kept.scalars = rows_of(rule.scalars, rule.n_scalars);
  static constexpr const char* step_name[] = {"step"};
  kept.steps = rows_of(step_name, rule.counts);
  const Handle control(to<AtenTensorHandle>(stack[at++]));
  kept.groups = to<std::vector<int64_t>>(stack[at++]);
  STD_TORCH_CHECK(static_cast<int64_t>(kept.groups.size()) == params.size(), rule.name, "_: groups has ",
                  kept.groups.size(), " entries, params has ", params.size());
  core::Storage storage;
  int64_t device = cpu_device;
  if (params.size()) {
    const View first = view(params[0], false);
    storage.param = first.format;
    device = first.device;
  }
  for (Format& format : storage.states) format = storage.param;
  Table table(R, rule, storage, device, std::move(kept));
  table.step(params, grads, {}, {control_view(control.get(), rule.name), {}, {}}, Table::Mode::write, true);
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

// The storage from the ints that pytrain.optim.plan writes: formats of the parameter and the states as core::Format
// numbers them, core::Keep, then ema (0 none, 1 by the step count, 2 with a given weight), zero_grad, stochastic,
// the seed, and the device: -1 the CPU, from 0 on CUDA's number.
core::Storage storage_from(const std::vector<int64_t>& words) {
  constexpr size_t expected = 1 + core::max_states + 6;
  STD_TORCH_CHECK(words.size() == expected, "_table: storage has ", words.size(), " entries, expected ", expected);
  core::Storage storage;
  const auto format = [&](size_t i) {
    STD_TORCH_CHECK(words[i] >= 0 && words[i] <= static_cast<int64_t>(Format::u8), "_table: storage[", i, "] is ",
                    words[i], ", not a format");
    return static_cast<Format>(words[i]);
  };
  size_t at = 0;
  storage.param = format(at++);
  for (Format& state : storage.states) state = format(at++);
  STD_TORCH_CHECK(words[at] >= 0 && words[at] <= static_cast<int64_t>(core::Keep::compensation), "_table: storage[", at,
                  "] is ", words[at], ", nothing that is kept");
  storage.keep = static_cast<core::Keep>(words[at++]);
  storage.ema_by_count = words[at] == 1;
  storage.ema = words[at++] != 0;
  storage.zero_grad = words[at++] != 0;
  storage.stochastic = words[at++] != 0;
  storage.seed = static_cast<uint64_t>(words[at++]);
  STD_TORCH_CHECK(words[at] >= cpu_device, "_table: storage[", at, "] is ", words[at], ", not a device");
  return storage;
}

// _table(str rule, Tensor[] states, Tensor[] scales, Tensor[] kept, Tensor[] emas, Tensor[] scalars, Tensor[] steps,
//        Tensor[] sums, int[] groups, int[] parts, int[] storage) -> int
void make_table(StableIValue* stack, uint64_t, uint64_t) {
  const auto name = to<std::string>(stack[0]);
  Kept kept;
  std::vector<Handle>* const lists[] = {&kept.states, &kept.scales, &kept.kept, &kept.emas, &kept.scalars, &kept.steps,
                                      &kept.sums};
  int at = 1;
  for (std::vector<Handle>* const list : lists) *list = handles(TensorList(stack[at++]));
  kept.groups = to<std::vector<int64_t>>(stack[at++]);
  kept.parts = to<std::vector<int64_t>>(stack[at++]);
  const auto words = to<std::vector<int64_t>>(stack[at++]);
  const core::Storage storage = storage_from(words);
  const auto& rules = all_rules();
  const auto rule = std::find_if(rules.begin(), rules.end(), [&](const RuleInfo& r) { return name == r.name; });
  STD_TORCH_CHECK(rule != rules.end(), "_table: there is no rule '", name, "'");
  auto table = std::make_shared<Table>(static_cast<int>(rule - rules.begin()), *rule, storage, words.back(),
                                       std::move(kept));
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

}  // namespace

std::shared_ptr<Table> find_table(int64_t id) {
  const std::lock_guard<std::mutex> lock(tables().lock);
  const auto found = tables().by_id.find(id);
  STD_TORCH_CHECK(found != tables().by_id.end(), "_table_step: there is no table ", id);
  return found->second;
}

Table::Mode mode_from(int64_t number, bool folds) {
  STD_TORCH_CHECK(number >= 0 && number <= static_cast<int64_t>(Table::Mode::write_fitted), "_table_step: mode is ",
                  number, ", expected 0 to 5");
  const auto mode = static_cast<Table::Mode>(number);
  STD_TORCH_CHECK(folds || mode != Table::Mode::settle, "_table_step: mode is 2, which _table_launch has");
  return mode;
}

namespace {

// _table_captured(int table) -> bool: whether a graph may still step what is in it.
void table_captured(StableIValue* stack, uint64_t, uint64_t) {
  stack[0] = from(find_table(to<int64_t>(stack[0]))->captured());
}

// The control block, and the host's copy of what was written to it: `given`, which may be the same tensor, or empty
// where the block alone has the numbers of this step. `fresh`: the device's own does not know of this step yet.
Controls controls_from(const Handle& block, const Handle& given, bool fresh, const char* op) {
  Controls controls{control_view(block.get(), op), {}, {}};
  if (controls.block.device == cpu_device && !simulates()) return controls;
  if (view(given.get(), false).numel == 0) return controls;
  const View host = control_view(given.get(), op);
  STD_TORCH_CHECK(host.device == cpu_device && host.numel == controls.block.numel, op,
                  "_: given must be a control block of the same size on the CPU");
  const int64_t n_rows = (host.numel - core::control_head) / core::control_row;
  controls.given = {static_cast<const double*>(host.data), n_rows, fresh};
  return controls;
}

// What the launches of this call do besides, from four arguments. Mode 2 settles: the loss scale (one fp32; none where
// nothing has scaled) or the state of a scaler that is to move; the rows' clip groups and the max_norms, as _control
// has them; that scaler's policy. Modes 4 and 5 move it: its state, and nothing.
Between between_from(const StableIValue* arguments, const Controls& controls, Table::Mode mode, const char* op) {
  const auto given = to<std::optional<AtenTensorHandle>>(arguments[0]);
  const Handle beside(given.value_or(nullptr));
  const auto policy = to<std::vector<double>>(arguments[3]);
  const Flat flat = given ? read_flat(beside.get()) : Flat{};
  Between between;
  between.clip_groups = to<std::vector<int64_t>>(arguments[1]);
  between.max_norms = to<std::vector<double>>(arguments[2]);
  const bool moves = mode >= Table::Mode::write || !policy.empty();
  STD_TORCH_CHECK(backend_of(controls.block.device), op, ": control is on a device that does not launch");
  STD_TORCH_CHECK(given || !moves, op, ": beside is missing, the state of the scaler that moves");
  STD_TORCH_CHECK(!given || (flat.format == Format::fp32 && flat.contiguous && flat.device == controls.block.device &&
                             flat.numel == (moves ? core::scaler_size : 1)),
                  op, ": beside must be a contiguous float32 tensor of ", moves ? core::scaler_size : 1,
                  " elements on the device of control, has ", flat.numel);
  if (moves) between.scaler = static_cast<core::Scaler*>(flat.data);
  if (mode != Table::Mode::settle) return between;
  STD_TORCH_CHECK(policy.empty() || policy.size() == core::policy_size, op, ": policy has ", policy.size(),
                  " entries, expected ", core::policy_size);
  std::copy(policy.begin(), policy.end(), reinterpret_cast<double*>(&between.policy));
  between.blocks = {{static_cast<core::Control*>(controls.block.data),
                     (controls.block.numel - core::control_head) / core::control_row}};
  between.scaled = {given.has_value()};
  between.scale = static_cast<const float*>(flat.data);  // a state begins with it
  between.check(op);
  return between;
}

// _table_step(int table, Tensor(a!)[] params, Tensor(b!)[] grads, int[] rows, Tensor(c!) control, Tensor given,
//             bool fresh, int mode, bool strict) -> int
// mode: 0 looks whether the tensors fit, 1 takes the gradients' statistics into control, 2 also settles that, 3 takes
// the rule's sums, 4 steps, 5 steps what the call before, with a mode from 1 to 3, has looked at.
// _table_launch is the same with (Tensor(d!)? beside, int[] clip_groups, float[] max_norms, float[] policy), and alone
// has mode 2: an op of its own, because arguments cost time where they have nothing to say.
template <bool folds>
void step_table(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = folds ? "_table_launch" : "_table_step";
  const TensorList params(stack[1]), grads(stack[2]);
  const auto rows = to<std::vector<int64_t>>(stack[3]);
  const Handle control(to<AtenTensorHandle>(stack[4])), given(to<AtenTensorHandle>(stack[5]));
  Controls block = controls_from(control, given, to<bool>(stack[6]), op);
  const Table::Mode mode = mode_from(to<int64_t>(stack[7]), folds);
  const bool strict = to<bool>(stack[8]);
  if (folds) block.between = between_from(stack + 9, block, mode, op);
  stack[0] = from(find_table(to<int64_t>(stack[0]))->step(params, grads, rows, block, mode, strict));
}

// _table_step_pairs(int table, Tensor pairs, int n, int[] rows, Tensor(a!) control, Tensor given, bool fresh, int mode)
//   -> int
// pairs: the memory of n Pairs, as int64, that the caller has just filled in and whose tensors it keeps alive.
// _table_launch_pairs adds to it what _table_launch adds to _table_step.
template <bool folds>
void step_table_pairs(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = folds ? "_table_launch_pairs" : "_table_step_pairs";
  const Handle pairs(to<AtenTensorHandle>(stack[1])), control(to<AtenTensorHandle>(stack[4])),
      given(to<AtenTensorHandle>(stack[5]));
  const int64_t n = to<int64_t>(stack[2]);
  const auto rows = to<std::vector<int64_t>>(stack[3]);
  const View memory = view(pairs.get(), false);
  Controls block = controls_from(control, given, to<bool>(stack[6]), op);
  const Table::Mode mode = mode_from(to<int64_t>(stack[7]), folds);
  if (folds) block.between = between_from(stack + 8, block, mode, op);
  constexpr int64_t words = sizeof(Pair) / sizeof(int64_t);
  STD_TORCH_CHECK(memory.usable && memory.contiguous && memory.numel >= n * words, op, ": pairs has ", memory.numel,
                  " elements, too few for n = ", n);
  const auto table = find_table(to<int64_t>(stack[0]));
  stack[0] = from(table->step(static_cast<const Pair*>(memory.data), n, rows, block, mode));
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
  m.def(
      "_table(str rule, Tensor[] states, Tensor[] scales, Tensor[] kept, Tensor[] emas, Tensor[] scalars, "
      "Tensor[] steps, Tensor[] sums, int[] groups, int[] parts, int[] storage) -> int");
  m.def("_table_free(int table) -> ()");
  m.def("_table_captured(int table) -> bool");
  const std::string by_lists =
      "(int table, Tensor(a!)[] params, Tensor(b!)[] grads, int[] rows, Tensor(c!) control, Tensor given, bool fresh, "
      "int mode, bool strict";
  const std::string by_pairs =
      "(int table, Tensor pairs, int n, int[] rows, Tensor(a!) control, Tensor given, bool fresh, int mode";
  const std::string more = 
      ", Tensor(d!)? beside, int[] clip_groups, float[] max_norms, float[] policy) -> int";
  m.def(("_table_step" + by_lists + ") -> int").c_str());
  m.def(("_table_step_pairs" + by_pairs + ") -> int").c_str());
  m.def(("_table_launch" + by_lists + more).c_str());
  m.def(("_table_launch_pairs" + by_pairs + more).c_str());
  m.def("_isa(str level) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(pytrain, CPU, m) {
  pytrain::ops::register_rules(m, std::make_integer_sequence<int, pytrain::ops::n_rules>{});
}

STABLE_TORCH_LIBRARY_IMPL(pytrain, CUDA, m) {
  pytrain::ops::register_rules(m, std::make_integer_sequence<int, pytrain::ops::n_rules>{});
}

// The private ops look at devices and layouts themselves, so that Python hears of a misfit instead of a dispatch error.
STABLE_TORCH_LIBRARY_IMPL(pytrain, CompositeExplicitAutograd, m) {
  m.impl("_table", &pytrain::ops::make_table);
  m.impl("_table_free", &pytrain::ops::free_table);
  m.impl("_table_captured", &pytrain::ops::table_captured);
  m.impl("_table_step", &pytrain::ops::step_table<false>);
  m.impl("_table_step_pairs", &pytrain::ops::step_table_pairs<false>);
  m.impl("_table_launch", &pytrain::ops::step_table<true>);
  m.impl("_table_launch_pairs", &pytrain::ops::step_table_pairs<true>);
  m.impl("_isa", &pytrain::ops::isa);
}
