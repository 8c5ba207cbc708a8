// The ops between pass 1 and pass 2 of a step, and after it: the control blocks' clip coefficients, the loss scale, and
// weight averages outside an optimizer's own loop.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/scaler.h"
#include "cpu/dispatch.h"
#include "ops/table.h"

namespace pytrain::ops {
namespace {

using torch::stable::detail::to;

// Below this many elements waking a second thread costs more than it brings, as in table.cpp.
constexpr int64_t grain_elements = 131072;

struct Block {
  core::Control* head;
  int64_t rows;
};

std::vector<Block> blocks(const TensorList& controls, const char* op) {
  std::vector<Block> found;
  for (int64_t i = 0; i < controls.size(); ++i) {
    const View v = control_view(controls[i], op);
    found.push_back({static_cast<core::Control*>(v.data), (v.numel - core::control_head) / core::control_row});
  }
  return found;
}

// Every row's clip coefficient from the norm of its clip group. Where a gradient of the group is bad there is no norm,
// and all optimizers that take part in it skip the step.
void clip(const std::vector<Block>& all, const std::vector<int64_t>& clip_groups,
          const std::vector<double>& max_norms) {
  std::vector<double> sumsq(max_norms.size()), bad(max_norms.size());
  const auto each_row = [&](auto visit) {
    size_t at = 0;
    for (const Block& block : all) {
      for (int64_t r = 0; r < block.rows; ++r, ++at) visit(*block.head, block.head->rows()[r], clip_groups[at]);
    }
  };
  each_row([&](core::Control& head, core::GroupRow& row, int64_t group) {
    if (group < 0) return;
    sumsq[group] += row.sumsq * head.inv_scale * head.inv_scale;
    bad[group] += head.found_inf;
  });
  each_row([&](core::Control& head, core::GroupRow& row, int64_t group) {
    row.clip_coef = group < 0 ? 1.0 : core::clip_coef(std::sqrt(sumsq[group]), max_norms[group]);
    if (group >= 0 && bad[group] != 0.0 && head.found_inf == 0.0) head.found_inf = bad[group];
  });
}

// _control(Tensor(a!)[] controls, Tensor scale, int[] scaled, int[] clip_groups, float[] max_norms) -> ()
// scale: one fp32, by which the gradients of the controls that are `scaled` were multiplied. clip_groups: for every row
// of all controls, which of max_norms limits the norm of the gradients of all rows with the same number; -1 for none.
void settle_controls(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList controls(stack[0]);
  const Handle scale(to<AtenTensorHandle>(stack[1]));
  const auto scaled = to<std::vector<int64_t>>(stack[2]), clip_groups = to<std::vector<int64_t>>(stack[3]);
  const auto max_norms = to<std::vector<double>>(stack[4]);
  const std::vector<Block> all = blocks(controls, "_control");
  const Flat factor = read_flat(scale.get());
  STD_TORCH_CHECK(factor.format == Format::fp32 && factor.numel == 1, "_control: scale must be one float32 on the CPU");
  STD_TORCH_CHECK(scaled.size() == all.size(), "_control: scaled has ", scaled.size(), " entries, controls has ",
                  all.size());
  size_t rows = 0;
  for (const Block& block : all) rows += static_cast<size_t>(block.rows);
  STD_TORCH_CHECK(clip_groups.size() == rows, "_control: clip_groups has ", clip_groups.size(), " entries, expected ",
                  rows);
  const int64_t n_groups = static_cast<int64_t>(max_norms.size());
  for (const int64_t group : clip_groups) {
    STD_TORCH_CHECK(group >= -1 && group < n_groups, "_control: clip_groups has ", group, ", expected -1 to ",
                    n_groups - 1);
  }
  for (size_t i = 0; i < all.size(); ++i) {
    core::Control& head = *all[i].head;
    if (scaled[i]) core::unscale(head, static_cast<double>(*static_cast<const float*>(factor.data)));
    double sumsq = 0.0;
    for (int64_t r = 0; r < all[i].rows; ++r) sumsq += head.rows()[r].sumsq;
    const double nan = std::numeric_limits<double>::quiet_NaN();
    head.grad_norm = head.first_bad >= 0.0 ? nan : std::sqrt(sumsq) * head.inv_scale;
    if (head.found_inf == 0.0 && core::overflows(head)) head.found_inf = 1.0;
  }
  clip(all, clip_groups, max_norms);
}

// _scaler_update(Tensor(a!) state, Tensor[] controls, float[] policy) -> ()
void update_scaler(StableIValue* stack, uint64_t, uint64_t) {
  const Handle state(to<AtenTensorHandle>(stack[0]));
  const TensorList controls(stack[1]);
  const auto words = to<std::vector<double>>(stack[2]);
  const Flat flat = read_flat(state.get());
  STD_TORCH_CHECK(flat.format == Format::fp32 && flat.contiguous && flat.numel == core::scaler_size,
                  "_scaler_update: state must be a contiguous float32 CPU tensor of ", core::scaler_size, " elements");
  STD_TORCH_CHECK(words.size() == core::policy_size, "_scaler_update: policy has ", words.size(), " entries, expected ",
                  core::policy_size);
  core::Policy policy;
  std::copy(words.begin(), words.end(), reinterpret_cast<double*>(&policy));
  double first_bad = -1.0, bad_optimizer = -1.0;
  const std::vector<Block> all = blocks(controls, "_scaler_update");
  for (size_t i = all.size(); i-- > 0;) {
    if (all[i].head->found_inf == 0.0) continue;
    bad_optimizer = static_cast<double>(i);
    first_bad = all[i].head->first_bad;
  }
  core::update(*static_cast<core::Scaler*>(flat.data), policy, bad_optimizer >= 0.0, first_bad, bad_optimizer);
}

// _average(Tensor(a!)[] averages, Tensor[] params, float weight) -> int
// averages[i] <- lerp(averages[i], params[i], weight), fp32 beside bf16 and fp16. Returns -1, or the first i whose
// tensors this loop does not walk (another device, dtype or strides); then nothing was written.
void average(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList averages(stack[0]), params(stack[1]);
  const auto weight = to<double>(stack[2]);
  STD_TORCH_CHECK(averages.size() == params.size(), "_average: averages has ", averages.size(), " tensors, params has ",
                  params.size());
  std::vector<cpu::AverageJob::Segment> segments(averages.size());
  std::vector<int64_t> offsets(averages.size());
  int64_t total = 0;
  for (int64_t i = 0; i < averages.size(); ++i) {
    const View a = view(averages[i], true), p = view(params[i], false);
    const Format wide = p.format == Format::fp64 ? Format::fp64 : Format::fp32;
    const bool fits = a.usable && p.usable && a.format == wide && same_sizes(a, p) && dense(a) &&
                      ((a.contiguous && p.contiguous) || same_strides(a, p));
    if (!fits) {
      stack[0] = torch::stable::detail::from(i);
      return;
    }
    segments[i] = {a.data, p.data, a.numel, p.format};
    offsets[i] = total;
    total += a.numel;
  }
  const cpu::AverageJob job{segments.data(), offsets.data(), averages.size(), weight};
  const cpu::Kernels& kernels = cpu::current_kernels();
  torch::stable::parallel_for(0, total, total > grain_elements ? 1 : grain_elements,
                              [&](int64_t begin, int64_t end) { kernels.average(job, begin, end); });
  stack[0] = torch::stable::detail::from(int64_t{-1});
}

}  // namespace
}  // namespace pytrain::ops

STABLE_TORCH_LIBRARY_FRAGMENT(pytrain, m) {
  m.def("_control(Tensor(a!)[] controls, Tensor scale, int[] scaled, int[] clip_groups, float[] max_norms) -> ()");
  m.def("_scaler_update(Tensor(a!) state, Tensor[] controls, float[] policy) -> ()");
  m.def("_average(Tensor(a!)[] averages, Tensor[] params, float weight) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(pytrain, CompositeExplicitAutograd, m) {
  m.impl("_control", &pytrain::ops::settle_controls);
  m.impl("_scaler_update", &pytrain::ops::update_scaler);
  m.impl("_average", &pytrain::ops::average);
}
