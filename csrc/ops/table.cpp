// Checks every tensor of a step before anything is written, then runs one parallel region over all their elements.
#include "ops/table.h"

#include <algorithm>
#include <utility>

#include "cpu/dispatch.h"

namespace pytrain::ops {
namespace {

using core::Segment;
using torch::stable::Tensor;

// Below this many elements waking a second thread costs more than it brings: 300 tensors of 256 elements took
// 236 ns each on one thread and 337 on two.
constexpr int64_t grain_elements = 131072;
// The check of one row takes about as long as the update of a hundred elements.
constexpr int64_t grain_rows = 1024;

constexpr uint8_t stage_grad = 1;   // the gradient lies differently in memory, or has another dtype
constexpr uint8_t stage_param = 2;  // the parameter has gaps: it is updated in a copy without them

int64_t bytes(Format format) {
  return format == Format::fp64 ? 8 : format == Format::fp32 ? 4 : 2;
}

std::string shape(const View& v) {
  std::string text = "(";
  for (int64_t d = 0; d < v.dim; ++d) text += (d ? ", " : "") + std::to_string(v.sizes[d]);
  return text + ")";
}

}  // namespace

enum class Table::Misfit : int {
  none,
  param_kind,
  param_format,
  overlap,
  grad_kind,
  grad_shape,
  state_kind,
  state_layout,
  step
};

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

void Table::check_call(int64_t n, const std::vector<int64_t>& rows, const View& control) const {
  const int64_t all = static_cast<int64_t>(groups_.size());
  const int64_t expected = rows.empty() ? all : static_cast<int64_t>(rows.size());
  STD_TORCH_CHECK(n == expected, info_.name, "_: params has ", n, " tensors, expected ", expected);
  const int64_t control_rows = (control.numel - core::control_head) / core::control_row;
  for (int64_t k = 0; k < n; ++k) {
    const int64_t row = rows.empty() ? k : rows[k];
    STD_TORCH_CHECK(row >= 0 && row < all, info_.name, "_: rows[", k, "] is ", row, ", expected 0 to ", all - 1);
    STD_TORCH_CHECK(groups_[row] < control_rows, info_.name, "_: groups[", row, "] is ", groups_[row], ", control has ",
                    control_rows, " rows");
  }
}

Table::Misfit Table::fit_states(int64_t row, const View& param, Segment& segment) {
  for (int s = 0; s < info_.n_states; ++s) {
    const AtenTensorHandle handle = states_[row * info_.n_states + s].get();
    const Flat flat = read_flat(handle);
    if (flat.format != param.format) return Misfit::state_kind;
    if (!(param.contiguous && flat.contiguous && param.numel == flat.numel)) {
      const View state = view(handle, true);
      if (!state.usable) return Misfit::state_kind;
      if (!same_sizes(param, state) || !same_strides(param, state)) return Misfit::state_layout;
    }
    segment.states[s] = flat.data;
  }
  return Misfit::none;
}

Table::Misfit Table::fit(int64_t k, int64_t row, const Pair& pair, Format format) {
  const View &p = pair.param, &g = pair.grad;
  Segment& segment = segments_[k];
  staging_[k] = 0;
  if (!p.usable) return Misfit::param_kind;
  if (p.format != format || format == Format::none) return Misfit::param_format;
  if (!g.usable) return Misfit::grad_kind;
  if (!same_sizes(p, g)) return Misfit::grad_shape;
  if (!dense(p)) {
    if (!evidently_disjoint(p)) return Misfit::overlap;
    staging_[k] = stage_param | stage_grad;
  } else if (g.format != p.format || (!(p.contiguous && g.contiguous) && !same_strides(p, g))) {
    staging_[k] = stage_grad;
  }
  segment.param = p.data;
  segment.grad = g.data;
  segment.numel = p.numel;
  segment.group = groups_[row];
  if (info_.counts) {
    const Flat step = read_flat(steps_[row].get());
    if (step.format != Format::fp32 || step.numel != 1) return Misfit::step;
    counts_[k] = static_cast<float*>(step.data);
    segment.step = static_cast<double>(*counts_[k]) + 1.0;
  }
  if (staging_[k] & stage_param) return Misfit::none;  // its states are checked against the copy
  return fit_states(row, p, segment);
}

Table::Found Table::fit_all(const Pair* pairs, int64_t n, const std::vector<int64_t>& rows) {
  segments_.resize(n);
  offsets_.resize(n);
  counts_.resize(n);
  staging_.resize(n);
  format_ = n ? pairs[0].param.format : Format::none;
  Found first{Misfit::none, n};
  std::mutex one_at_a_time;
  torch::stable::parallel_for(0, n, grain_rows, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const Misfit misfit = fit(k, rows.empty() ? k : rows[k], pairs[k], format_);
      if (misfit == Misfit::none) continue;
      const std::lock_guard<std::mutex> lock(one_at_a_time);
      if (k < first.k) first = {misfit, k};
      return;
    }
  });
  if (first.misfit != Misfit::none) return first;
  bool moved = false;
  extents_.resize(groups_.size());
  for (int64_t k = 0; k < n; ++k) {
    if (staging_[k] & stage_param) continue;  // updated in a copy
    const auto* const begin = static_cast<const char*>(segments_[k].param);
    const std::pair<const char*, const char*> extent{begin, begin + segments_[k].numel * bytes(format_)};
    auto& remembered = extents_[rows.empty() ? k : rows[k]];
    moved |= remembered != extent;
    remembered = extent;
  }
  if (moved) shared_ = find_shared_memory();
  return first;
}

bool Table::find_shared_memory() {
  auto sorted = extents_;
  std::sort(sorted.begin(), sorted.end());
  const char* reached = nullptr;
  for (const auto& [begin, end] : sorted) {
    if (begin == end) continue;
    if (begin < reached) return true;
    reached = end;
  }
  return false;
}

std::string Table::explain(Found found, const Pair& pair) const {
  const std::string at = "[" + std::to_string(found.k) + "]";
  switch (found.misfit) {
    case Misfit::param_kind:
      return "params" + at + " is not a strided tensor on the CPU";
    case Misfit::param_format:
      return "params" + at +
             " has a dtype unlike params[0]'s, or one that is not float32, float64, bfloat16 or float16";
    case Misfit::overlap:
      return "params" + at + " has elements that share memory (for instance from expand()); pass a contiguous tensor";
    case Misfit::grad_kind:
      return "grads" + at + " is not a strided tensor on the CPU";
    case Misfit::grad_shape:
      return "grads" + at + " has shape " + shape(pair.grad) + ", params" + at + " has " + shape(pair.param);
    case Misfit::state_kind:
      return "a state of params" + at + " is not a strided tensor on the CPU with its dtype";
    case Misfit::state_layout:
      return "a state of params" + at + " has a shape or strides unlike its";
    case Misfit::step:
      return "step" + at + " is not one float32 on the CPU";
    case Misfit::none:
      break;
  }
  return "all tensors fit";
}

int64_t Table::run(const View& control) {
  const auto* const block = static_cast<const core::Control*>(control.data);
  if (block->found_inf != 0.0) return skipped;
  const int64_t n = static_cast<int64_t>(segments_.size());
  int64_t total = 0;
  for (int64_t k = 0; k < n; ++k) {
    if (info_.counts) *counts_[k] = static_cast<float>(segments_[k].step);
    offsets_[k] = total;
    total += segments_[k].numel;
  }
  const auto kernel = cpu::current_kernels().step[rule_][static_cast<int>(format_)];
  if (shared_) {  // parameters in the same memory are stepped one after the other
    kernel(segments_.data(), offsets_.data(), n, block, 0, total);
    return applied;
  }
  torch::stable::parallel_for(0, total, total > grain_elements ? 1 : grain_elements, [&](int64_t begin, int64_t end) {
    kernel(segments_.data(), offsets_.data(), n, block, begin, end);
  });
  return applied;
}

int64_t Table::step(const Pair* pairs, int64_t n, const std::vector<int64_t>& rows, const View& control, bool write) {
  const std::unique_lock<std::mutex> alone(busy_, std::try_to_lock);
  STD_TORCH_CHECK(alone.owns_lock(), info_.name, "_: two threads step the same parameters at once");
  check_call(n, rows, control);
  const Found found = fit_all(pairs, n, rows);
  if (found.misfit != Misfit::none) return found.k;
  for (int64_t k = 0; k < n; ++k) {
    if (staging_[k]) return k;
  }
  return write ? run(control) : applied;
}

int64_t Table::step(const TensorList& params, const TensorList& grads, const std::vector<int64_t>& rows,
                    const View& control, bool write, bool strict) {
  const std::unique_lock<std::mutex> alone(busy_, std::try_to_lock);
  STD_TORCH_CHECK(alone.owns_lock(), info_.name, "_: two threads step the same parameters at once");
  const int64_t n = params.size();
  STD_TORCH_CHECK(grads.size() == n, info_.name, "_: grads has ", grads.size(), " tensors, params has ", n);
  check_call(n, rows, control);
  std::vector<Pair> pairs(n);
  for (int64_t k = 0; k < n; ++k) pairs[k] = {view(params[k], true), view(grads[k], false)};
  Found found = fit_all(pairs.data(), n, rows);

  // Copies of the few tensors that lie in memory in a way the loop does not walk.
  std::vector<std::pair<Tensor, Tensor>> write_back;  // (parameter, its updated copy)
  std::vector<Tensor> grad_copies;
  for (int64_t k = 0; found.misfit == Misfit::none && k < n; ++k) {
    if (!staging_[k]) continue;
    const Tensor p = share(params[k]).take(), g = share(grads[k]).take();
    Tensor grad_copy = torch::stable::empty_like(p);
    torch::stable::copy_(grad_copy, g);
    segments_[k].grad = grad_copy.const_data_ptr();
    grad_copies.push_back(grad_copy);
    if (staging_[k] & stage_param) {
      Tensor copy = torch::stable::empty_like(p);
      torch::stable::copy_(copy, p);
      segments_[k].param = copy.mutable_data_ptr();
      found = {fit_states(rows.empty() ? k : rows[k], view(copy.get(), true), segments_[k]), k};
      write_back.emplace_back(p, copy);
    }
  }
  if (found.misfit != Misfit::none) {
    STD_TORCH_CHECK(!strict, info_.name, "_: ", explain(found, pairs[found.k]));
    return found.k;
  }
  const int64_t result = write ? run(control) : applied;
  if (write && result == applied) {
    for (auto& [param, copy] : write_back) torch::stable::copy_(param, copy);
  }
  return result;
}

}  // namespace pytrain::ops
