// Checks every tensor of a step before anything is written, then runs one parallel region over all their elements.
#include "ops/table.h"

#include <atomic>
#include <optional>
#include <utility>

#include "cpu/dispatch.h"

namespace pytrain::ops {
namespace {

using core::Format;
using core::Segment;
using torch::stable::Tensor;

// Below this many elements a second thread costs more than it brings; torch uses the same number.
constexpr int64_t grain_elements = 32768;
// The check of one row takes about as long as the update of a few hundred elements.
constexpr int64_t grain_rows = 512;

constexpr uint8_t stage_grad = 1;   // the gradient lies differently in memory, or has another dtype
constexpr uint8_t stage_param = 2;  // the parameter has gaps: it is updated in a copy without them

std::optional<Format> format_of(int32_t dtype) {
  static const int32_t dtypes[core::format_count] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(),
                                                     aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  for (int f = 0; f < core::format_count; ++f) {
    if (dtype == dtypes[f]) return static_cast<Format>(f);
  }
  return std::nullopt;
}

std::string shape(const View& v) {
  std::string text = "(";
  for (int64_t d = 0; d < v.dim; ++d) text += (d ? ", " : "") + std::to_string(v.sizes[d]);
  return text + ")";
}

}  // namespace

enum class Table::Misfit : int { none, param_kind, param_dtype, overlap, grad_kind, grad_shape, state_kind, state_layout,
                                 step };

Table::Table(int rule, const RuleInfo& info, std::vector<Handle> states, std::vector<Handle> steps,
             std::vector<int64_t> groups)
    : rule_(rule), info_(info), states_(std::move(states)), steps_(std::move(steps)), groups_(std::move(groups)) {
  const size_t n = groups_.size();
  STD_TORCH_CHECK(states_.size() == n * info_.n_states, info_.name, "_: expected ", n * info_.n_states, " states (",
                  info_.n_states, " for each of ", n, " groups), got ", states_.size());
  STD_TORCH_CHECK(steps_.size() == (info_.counts ? n : 0), info_.name, "_: expected ", info_.counts ? n : 0,
                  " steps, got ", steps_.size());
  for (size_t row = 0; row < n; ++row) {
    STD_TORCH_CHECK(groups_[row] >= 0, info_.name, "_: groups[", row, "] is ", groups_[row], ", expected >= 0");
  }
}

Table::Misfit Table::fit_states(int64_t row, const View& param, Segment& segment) {
  for (int s = 0; s < info_.n_states; ++s) {
    const View state = view(states_[row * info_.n_states + s].get(), true);
    if (!state.usable || state.dtype != param.dtype) return Misfit::state_kind;
    const bool flat = param.contiguous && state.contiguous && param.numel == state.numel;
    if (!flat && !(same_sizes(param, state) && same_strides(param, state))) return Misfit::state_layout;
    segment.states[s] = state.data;
  }
  return Misfit::none;
}

Table::Misfit Table::fit(int64_t k, int64_t row, const TensorList& params, const TensorList& grads, uint8_t& staging) {
  const View p = view(params[k], true), g = view(grads[k], false);
  Segment& segment = segments_[k];
  staging = 0;
  if (!p.usable) return Misfit::param_kind;
  if (p.dtype != dtype_) return Misfit::param_dtype;
  if (!g.usable) return Misfit::grad_kind;
  if (!same_sizes(p, g)) return Misfit::grad_shape;
  if (!p.contiguous && !dense(p)) {
    if (!evidently_disjoint(p)) return Misfit::overlap;
    staging = stage_param | stage_grad;
  } else if (g.dtype != p.dtype || (!(p.contiguous && g.contiguous) && !same_strides(p, g))) {
    staging = stage_grad;
  }
  segment.param = p.data;
  segment.grad = g.data;
  segment.numel = p.numel;
  segment.group = groups_[row];
  if (info_.counts) {
    static const int32_t fp32 = aoti_torch_dtype_float32();
    const View step = view(steps_[row].get(), true);
    if (!step.usable || step.dtype != fp32 || step.numel != 1) return Misfit::step;
    counts_[k] = step.data;
    segment.step = static_cast<double>(*static_cast<const float*>(step.data)) + 1.0;
  }
  if (staging & stage_param) return Misfit::none;  // its states are checked against the copy
  return fit_states(row, p, segment);
}

Table::Misfit Table::fit_all(const TensorList& params, const TensorList& grads, const std::vector<int64_t>& rows,
                             int64_t& bad) {
  const int64_t n = params.size();
  std::atomic<int64_t> first_bad{n};
  std::vector<Misfit> misfits(1, Misfit::none);
  std::mutex one_at_a_time;
  torch::stable::parallel_for(0, n, grain_rows, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const Misfit misfit = fit(k, rows.empty() ? k : rows[k], params, grads, staging_[k]);
      if (misfit == Misfit::none) continue;
      const std::lock_guard<std::mutex> lock(one_at_a_time);
      if (k < first_bad) {
        first_bad = k;
        misfits[0] = misfit;
      }
      return;
    }
  });
  bad = first_bad;
  return misfits[0];
}

std::string Table::explain(Misfit misfit, int64_t k, int64_t row, const TensorList& params,
                           const TensorList& grads) const {
  const View p = view(params[k], false), g = view(grads[k], false);
  const std::string at = "[" + std::to_string(k) + "]";
  switch (misfit) {
    case Misfit::param_kind:
      return "params" + at + " is not a strided tensor on the CPU";
    case Misfit::param_dtype:
      return "params" + at + " has a dtype unlike params[0]'s, or one that is not float32, float64, bfloat16 or float16";
    case Misfit::overlap:
      return "params" + at + " has elements that share memory (for instance from expand()); pass a contiguous tensor";
    case Misfit::grad_kind:
      return "grads" + at + " is not a strided tensor on the CPU";
    case Misfit::grad_shape:
      return "grads" + at + " has shape " + shape(g) + ", params" + at + " has " + shape(p);
    case Misfit::state_kind:
      return "a state of params" + at + " is not a strided tensor on the CPU with its dtype";
    case Misfit::state_layout:
      return "a state of params" + at + " has a shape or strides unlike its";
    case Misfit::step:
      return "step" + at + " is not one float32 on the CPU";
    case Misfit::none:
      break;
  }
  return "params" + at + " fits row " + std::to_string(row);
}

void Table::update(const core::Control* control) {
  const int64_t n = static_cast<int64_t>(segments_.size());
  int64_t total = 0;
  for (int64_t k = 0; k < n; ++k) {
    offsets_[k] = total;
    total += segments_[k].numel;
  }
  const auto kernel = cpu::current_kernels().step[rule_][static_cast<int>(*format_of(dtype_))];
  torch::stable::parallel_for(0, total, grain_elements, [&](int64_t begin, int64_t end) {
    kernel(segments_.data(), offsets_.data(), n, control, begin, end);
  });
}

int64_t Table::step(const TensorList& params, const TensorList& grads, const std::vector<int64_t>& rows,
                    const View& control, bool write, bool strict) {
  const std::unique_lock<std::mutex> alone(busy_, std::try_to_lock);
  STD_TORCH_CHECK(alone.owns_lock(), info_.name, "_: two threads step the same parameters at once");
  const int64_t n = params.size();
  const int64_t expected = rows.empty() ? static_cast<int64_t>(groups_.size()) : static_cast<int64_t>(rows.size());
  STD_TORCH_CHECK(n == expected, info_.name, "_: params has ", n, " tensors, expected ", expected);
  STD_TORCH_CHECK(grads.size() == n, info_.name, "_: grads has ", grads.size(), " tensors, params has ", n);
  const int64_t control_rows = (control.numel - core::control_head) / core::control_row;
  for (int64_t k = 0; k < n; ++k) {
    const int64_t row = rows.empty() ? k : rows[k];
    STD_TORCH_CHECK(row >= 0 && row < static_cast<int64_t>(groups_.size()), info_.name, "_: rows[", k, "] is ", row,
                    ", expected 0 to ", groups_.size() - 1);
    STD_TORCH_CHECK(groups_[row] < control_rows, info_.name, "_: groups[", row, "] is ", groups_[row], ", control has ",
                    control_rows, " rows");
  }
  if (n == 0) return applied;

  segments_.resize(n);
  offsets_.resize(n);
  counts_.resize(n);
  staging_.resize(n);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(params[0], &dtype_));
  int64_t bad = 0;
  Misfit misfit = format_of(dtype_) ? fit_all(params, grads, rows, bad) : Misfit::param_dtype;

  // Copies of the few tensors that lie in memory in a way the loop does not walk.
  std::vector<std::pair<Tensor, Tensor>> write_back;  // (parameter, its updated copy)
  std::vector<Tensor> alive;
  for (int64_t k = 0; misfit == Misfit::none && k < n; ++k) {
    if (!staging_[k]) continue;
    const Tensor p = share(params[k]).take(), g = share(grads[k]).take();
    Tensor grad_copy = torch::stable::empty_like(p);
    torch::stable::copy_(grad_copy, g);
    segments_[k].grad = grad_copy.const_data_ptr();
    alive.push_back(grad_copy);
    if (staging_[k] & stage_param) {
      Tensor copy = torch::stable::empty_like(p);
      torch::stable::copy_(copy, p);
      segments_[k].param = copy.mutable_data_ptr();
      misfit = fit_states(rows.empty() ? k : rows[k], view(copy.get(), true), segments_[k]);
      bad = k;
      write_back.emplace_back(p, copy);
    }
  }
  if (misfit != Misfit::none) {
    STD_TORCH_CHECK(!strict, info_.name, "_: ", explain(misfit, bad, rows.empty() ? bad : rows[bad], params, grads));
    return bad;
  }

  if (!write) return applied;
  const auto* const block = static_cast<const core::Control*>(control.data);
  if (block->found_inf != 0.0) return skipped;
  if (info_.counts) {
    for (int64_t k = 0; k < n; ++k) *static_cast<float*>(counts_[k]) = static_cast<float>(segments_[k].step);
  }
  update(block);
  for (auto& [param, copy] : write_back) torch::stable::copy_(param, copy);
  return applied;
}

}  // namespace pytrain::ops
