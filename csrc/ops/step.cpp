// The ops between pass 1 and pass 2 of a step, and after it: the control blocks' clip coefficients, the loss scale, and
// weight averages outside an optimizer's own loop.
#include <algorithm>
#include <vector>

#include "core/scaler.h"
#include "cpu/dispatch.h"
#include "ops/host.h"
#include "ops/settle.h"
#include "ops/table.h"

namespace pytrain::ops {
namespace {

using torch::stable::detail::to;

// Below this many elements waking a second thread costs more than it brings, as in table.cpp.
constexpr int64_t grain_elements = 131072;

// The control blocks of a step, all on one device.
struct Blocks {
  std::vector<Between::Block> all;
  int64_t device = cpu_device;
};

Blocks blocks(const TensorList& controls, const char* op) {
  Blocks found;
  for (int64_t i = 0; i < controls.size(); ++i) {
    const View v = control_view(controls[i], op);
    if (i == 0) found.device = v.device;
    STD_TORCH_CHECK(v.device == found.device, op, ": controls[", i, "] is on another device than controls[0]");
    found.all.push_back({static_cast<core::Control*>(v.data), (v.numel - core::control_head) / core::control_row});
  }
  return found;
}

void settle_here(const Between& between) {
  const std::vector<int64_t> words = between.words();
  const auto n = static_cast<int64_t>(between.blocks.size());
  std::vector<double> room(2 * between.max_norms.size());
  core::settle({n, static_cast<int64_t>(between.max_norms.size()), words.data(), words.data() + n,
                between.scaled.data(), between.clip_groups.data(), between.max_norms.data(), room.data()},
               static_cast<double>(*between.scale));
}

// _control(Tensor(a!)[] controls, Tensor scale, int[] scaled, int[] clip_groups, float[] max_norms) -> ()
// scale: one fp32, by which the gradients of the controls that are `scaled` were multiplied. clip_groups: for every row
// of all controls, which of max_norms limits the norm of the gradients of all rows with the same number; -1 for none.
void settle_controls(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList controls(stack[0]);
  const Handle scale(to<AtenTensorHandle>(stack[1]));
  const Blocks found = blocks(controls, "_control");
  const Flat factor = read_flat(scale.get());
  STD_TORCH_CHECK(factor.format == Format::fp32 && factor.numel == 1 && factor.device == found.device,
                  "_control: scale must be one float32 on the device of the controls");
  const Between between{found.all, to<std::vector<int64_t>>(stack[2]), to<std::vector<int64_t>>(stack[3]),
                        to<std::vector<double>>(stack[4]), static_cast<const float*>(factor.data)};
  between.check("_control");
  if (!backend_of(found.device)) return settle_here(between);
  Queue queue(found.device);
  queue.run([&](void* stream) {
    const SettleArgument argument(queue, between);
    queue.check(queue.backend().settle(argument.job, stream), "_control");
  });
}

// _scaler_update(Tensor(a!) state, Tensor[] controls, float[] policy) -> ()
void update_scaler(StableIValue* stack, uint64_t, uint64_t) {
  const Handle state(to<AtenTensorHandle>(stack[0]));
  const TensorList controls(stack[1]);
  const auto words = to<std::vector<double>>(stack[2]);
  const Flat flat = read_flat(state.get());
  STD_TORCH_CHECK(flat.format == Format::fp32 && flat.contiguous && flat.numel == core::scaler_size,
                  "_scaler_update: state must be a contiguous float32 tensor of ", core::scaler_size, " elements");
  STD_TORCH_CHECK(words.size() == core::policy_size, "_scaler_update: policy has ", words.size(), " entries, expected ",
                  core::policy_size);
  core::Policy policy;
  std::copy(words.begin(), words.end(), reinterpret_cast<double*>(&policy));
  const Blocks found = blocks(controls, "_scaler_update");
  STD_TORCH_CHECK(found.all.empty() || flat.device == found.device,
                  "_scaler_update: state is on another device than controls[0]");
  std::vector<int64_t> addresses;
  for (const Between::Block& block : found.all) addresses.push_back(word(block.head));
  const auto n = static_cast<int64_t>(addresses.size());
  auto* const scaler = static_cast<core::Scaler*>(flat.data);
  if (!backend_of(flat.device)) return core::update(*scaler, policy, addresses.data(), n);
  Queue queue(flat.device);
  queue.run([&](void* stream) {
    cuda::ScalerUpdate job;
    Handle memory;
    hand_over(queue, addresses, job.words, memory);
    job.state = scaler;
    job.policy = policy;
    job.n_controls = n;
    queue.check(queue.backend().update_scaler(job, stream), "_scaler_update");
  });
}

// One launch a dtype of parameters.
void average_on_device(int64_t device, const std::vector<cpu::AverageJob::Segment>& segments, double weight) {
  Queue queue(device);
  queue.run([&](void* stream) {
    for (const Format format : {Format::fp32, Format::fp64, Format::bf16, Format::fp16}) {
      std::vector<cuda::Item> items;
      for (const auto& segment : segments) {
        if (segment.format != format || segment.numel == 0) continue;
        cuda::Item item{};
        item.memory.param = const_cast<void*>(segment.param);
        item.memory.numel = segment.numel;
        item.extra.ema = segment.average;
        items.push_back(item);
      }
      if (items.empty()) continue;
      cuda::Job job{};
      job.storage.param = format;
      job.weight = weight;
      DeviceTable table;
      table.load(queue, stream, items, job);
      queue.check(queue.backend().average(job, queue.backend().multiprocessors(device), stream), "_average");
    }
  });
}

// _average(Tensor(a!)[] averages, Tensor[] params, float weight) -> int
// averages[i] <- lerp(averages[i], params[i], weight), fp32 beside bf16 and fp16. Returns -1, or the first i whose
// tensors this loop does not walk (another device, dtype or strides); then nothing was written.
void average(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList averages(stack[0]), params(stack[1]);
  const auto weight = to<double>(stack[2]);
  STD_TORCH_CHECK(averages.size() == params.size(), "_average: averages has ", averages.size(), " tensors, params has ",
                  params.size());
  int64_t device = cpu_device;
  std::vector<cpu::AverageJob::Segment> segments(averages.size());
  std::vector<int64_t> offsets(averages.size());
  int64_t total = 0;
  for (int64_t i = 0; i < averages.size(); ++i) {
    const View a = view(averages[i], true), p = view(params[i], false);
    const Format wide = p.format == Format::fp64 ? Format::fp64 : Format::fp32;
    if (i == 0) device = a.device;
    const bool here = a.usable && p.usable && a.device == device && p.device == device && has_kernels(device);
    const bool fits = here && a.format == wide && same_sizes(a, p) && dense(a) &&
                      ((a.contiguous && p.contiguous) || same_strides(a, p));
    if (!fits) {
      stack[0] = torch::stable::detail::from(i);
      return;
    }
    segments[i] = {a.data, p.data, a.numel, p.format};
    offsets[i] = total;
    total += a.numel;
  }
  if (backend_of(device)) {
    average_on_device(device, segments, weight);
    stack[0] = torch::stable::detail::from(int64_t{-1});
    return;
  }
  const cpu::AverageJob job{segments.data(), offsets.data(), averages.size(), weight};
  const cpu::Kernels& kernels = cpu::current_kernels();
  torch::stable::parallel_for(0, total, total > grain_elements ? 1 : grain_elements,
                              [&](int64_t begin, int64_t end) { kernels.average(job, begin, end); });
  stack[0] = torch::stable::detail::from(int64_t{-1});
}

Controls controls_at(core::Control* control, int64_t numbers) {
  STD_TORCH_CHECK(numbers >= core::control_head + core::control_row, "_table_step: control has ", numbers, " numbers");
  View block;
  block.data = control;
  block.numel = numbers;
  block.format = Format::fp64;
  return {block, {}, {}};
}

int64_t step_host(int64_t table, const core::Pair* pairs, int64_t n, const std::vector<int64_t>& rows,
                  core::Control* control, int64_t numbers, int64_t mode, const Beside& beside) {
  return find_table(table)->step(pairs, n, rows, controls_at(control, numbers), mode_from(mode, false), beside);
}

int64_t gather_host(int64_t table, const core::Pair* pairs, int64_t n, const Gather& gather, core::Control* control,
                    int64_t numbers, int64_t mode) {
  return find_table(table)->gather(pairs, n, gather, controls_at(control, numbers), mode_from(mode, false));
}

void settle_host(const std::vector<std::pair<core::Control*, int64_t>>& blocks, float scale,
                 const std::vector<int64_t>& scaled, const std::vector<int64_t>& clip_groups,
                 const std::vector<double>& max_norms) {
  Between between{{}, scaled, clip_groups, max_norms, &scale};
  for (const auto& [head, rows] : blocks) between.blocks.push_back({head, rows});
  between.check("_control");
  settle_here(between);
}

bool update_scaler_host(core::Scaler* scaler, const core::Policy& policy, const std::vector<int64_t>& controls) {
  const float before = scaler->scale;
  core::update(*scaler, policy, controls.data(), static_cast<int64_t>(controls.size()));
  return scaler->scale != before;
}

// _host_calls() -> int: the address of HostCalls.
void host_calls(StableIValue* stack, uint64_t, uint64_t) {
  static const HostCalls calls{&step_host, &gather_host, &settle_host, &update_scaler_host};
  stack[0] = torch::stable::detail::from(word(&calls));
}

}  // namespace
}  // namespace pytrain::ops

STABLE_TORCH_LIBRARY_FRAGMENT(pytrain, m) {
  m.def("_control(Tensor(a!)[] controls, Tensor scale, int[] scaled, int[] clip_groups, float[] max_norms) -> ()");
  m.def("_scaler_update(Tensor(a!) state, Tensor[] controls, float[] policy) -> ()");
  m.def("_host_calls() -> int");
  m.def("_average(Tensor(a!)[] averages, Tensor[] params, float weight) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(pytrain, CompositeExplicitAutograd, m) {
  m.impl("_control", &pytrain::ops::settle_controls);
  m.impl("_scaler_update", &pytrain::ops::update_scaler);
  m.impl("_host_calls", &pytrain::ops::host_calls);
  m.impl("_average", &pytrain::ops::average);
}
