// Adafactor's op, private because pytrain.optim.Adafactor keeps its states:
//   _adafactor(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] row_vars, Tensor(c!)[] col_vars, Tensor(d!)[] steps,
//              int[] groups, Tensor control) -> int
// params: contiguous fp32 or fp64. row_vars[i] has params[i]'s sizes with a last one of 1, col_vars[i] with a last but
// one of 1; of a params[i] with fewer than two dimensions row_vars[i] has no elements and col_vars[i] its sizes.
// Returns -1, or -2 where control has found_inf: then nothing was written. Hypers as cpu/adafactor_loops.h has them.
#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/control.h"
#include "cpu/dispatch.h"
#include "ops/table.h"

namespace pytrain::ops {
namespace {

using cpu::AdafactorFunctions;
using cpu::AdafactorJob;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

// Below this many elements waking a second thread costs more than it brings.
constexpr int64_t grain_elements = 65536;
// Tensors go through the phases together up to this many elements: enough work for every thread in a phase, and few
// enough that a gradient is still in the last cache when the next phase reads it.
constexpr int64_t wave_elements = 1 << 20;

std::string text_of(const std::vector<int64_t>& sizes) {
  std::string text = "(";
  for (size_t d = 0; d < sizes.size(); ++d) text += (d ? ", " : "") + std::to_string(sizes[d]);
  return text + ")";
}

std::vector<int64_t> sizes_of(const View& v) { return {v.sizes, v.sizes + v.dim}; }

using Extent = std::pair<const char*, const char*>;

Extent extent(const View& v) {
  const auto* const begin = static_cast<const char*>(v.data);
  return {begin, begin + v.numel * core::bytes(v.format)};
}

// A tensor that is written, as a state must be: of one format and these sizes, without gaps.
View written(const char* list, int64_t i, AtenTensorHandle tensor, Format format, const std::vector<int64_t>& sizes) {
  const View v = view(tensor, true);
  STD_TORCH_CHECK(v.usable && v.contiguous, "_adafactor: ", list, "[", i, "] is not a contiguous tensor on the CPU");
  STD_TORCH_CHECK(v.format == format, "_adafactor: ", list, "[", i, "] is not ",
                  format == Format::fp32 ? "float32" : "float64", " as expected");
  STD_TORCH_CHECK(sizes_of(v) == sizes, "_adafactor: ", list, "[", i, "] has shape ", text_of(sizes_of(v)),
                  ", expected ", text_of(sizes));
  return v;
}

struct Lists {
  const TensorList params, grads, row_vars, col_vars, steps;
  const std::vector<int64_t> groups;
};

// One tensor of a step, with the memory of what the kernels prepare of it.
struct Prepared {
  AdafactorJob job;
  const AdafactorFunctions* functions;
  int64_t numel, group;
  float* count;
  alignas(16) unsigned char memory[cpu::max_adafactor_bytes];
};

class Step {
 public:
  // Checks all tensors; writes nothing.
  Step(const Lists& lists, const View& control) : control_(static_cast<const core::Control*>(control.data)) {
    const int64_t n = lists.params.size();
    const auto check_length = [&](const char* list, int64_t found) {
      STD_TORCH_CHECK(found == n, "_adafactor: ", list, " has ", found, " entries, params has ", n);
    };
    check_length("grads", lists.grads.size());
    check_length("row_vars", lists.row_vars.size());
    check_length("col_vars", lists.col_vars.size());
    check_length("steps", lists.steps.size());
    check_length("groups", static_cast<int64_t>(lists.groups.size()));
    const int64_t rows = (control.numel - core::control_head) / core::control_row;
    prepared_.reserve(n);
    for (int64_t i = 0; i < n; ++i) {
      STD_TORCH_CHECK(lists.groups[i] >= 0 && lists.groups[i] < rows, "_adafactor: groups[", i, "] is ",
                      lists.groups[i], ", expected 0 to ", rows - 1);
      add(lists, i);
    }
    copy_grads(lists);
  }

  int64_t run() {
    if (control_->found_inf != 0.0) return Table::skipped;
    const bool apart = shares_memory();
    const int64_t n = static_cast<int64_t>(prepared_.size());
    for (int64_t begin = 0, end; begin < n; begin = end) {
      int64_t total = prepared_[begin].numel;
      for (end = begin + 1; end < n && !apart && total + prepared_[end].numel <= wave_elements; ++end) {
        total += prepared_[end].numel;
      }
      run_wave(begin, end);
    }
    for (const Prepared& one : prepared_) *one.count = static_cast<float>(one.job.step);
    return Table::applied;
  }

 private:
  void add(const Lists& lists, int64_t i) {
    const View p = view(lists.params[i], true), g = view(lists.grads[i], false);
    STD_TORCH_CHECK(p.usable && p.contiguous, "_adafactor: params[", i, "] is not a contiguous tensor on the CPU");
    STD_TORCH_CHECK(p.format == Format::fp32 || p.format == Format::fp64, "_adafactor: params[", i,
                    "] is neither float32 nor float64");
    STD_TORCH_CHECK(g.usable, "_adafactor: grads[", i, "] is not a strided tensor on the CPU");
    STD_TORCH_CHECK(same_sizes(p, g), "_adafactor: grads[", i, "] has shape ", text_of(sizes_of(g)), ", params[", i,
                    "] has ", text_of(sizes_of(p)));
    if (!g.contiguous || g.format != p.format) to_copy_.push_back(i);
    const bool matrix = p.dim >= 2;
    std::vector<int64_t> row_sizes = sizes_of(p), col_sizes = row_sizes;
    if (matrix) row_sizes[p.dim - 1] = col_sizes[p.dim - 2] = 1;
    const View col = written("col_vars", i, lists.col_vars[i], p.format, col_sizes);
    const View row = written("row_vars", i, lists.row_vars[i], p.format, matrix ? row_sizes : std::vector<int64_t>{0});
    const View step = written("steps", i, lists.steps[i], Format::fp32, {});
    Prepared one;
    one.functions = p.format == Format::fp32 ? &kernels_.adafactor32 : &kernels_.adafactor64;
    one.numel = p.numel;
    one.group = lists.groups[i];
    one.count = static_cast<float*>(step.data);
    one.job = {p.data, g.data, row.data, col.data, 1, 1, p.numel, matrix, static_cast<double>(*one.count) + 1.0};
    if (matrix) {
      for (int64_t d = 0; d < p.dim - 2; ++d) one.job.batch *= p.sizes[d];
      one.job.rows = p.sizes[p.dim - 2];
      one.job.cols = p.sizes[p.dim - 1];
    }
    prepared_.push_back(one);
    for (const View& v : {p, row, col}) extents_.push_back(extent(v));
  }

  // Gradients that lie in memory unlike their parameter or have another dtype.
  void copy_grads(const Lists& lists) {
    for (const int64_t i : to_copy_) {
      const Tensor p = share(lists.params[i]).take(), g = share(lists.grads[i]).take();
      Tensor copy = torch::stable::empty_like(p);
      torch::stable::copy_(copy, g);
      prepared_[i].job.grad = copy.const_data_ptr();
      grad_copies_.push_back(copy);
    }
  }

  // Whether anything that is written is written for two parameters; they are then stepped one after the other.
  bool shares_memory() {
    std::sort(extents_.begin(), extents_.end());
    const char* reached = nullptr;
    for (const auto& [begin, end] : extents_) {
      if (begin == end) continue;
      if (begin < reached) return true;
      reached = end;
    }
    return false;
  }

  // All phases of some tensors; a phase ends before the next one begins.
  void run_wave(int64_t begin, int64_t end) {
    int64_t needed = 0;
    for (int64_t k = begin; k < end; ++k) needed += prepared_[k].functions->workspace(prepared_[k].job);
    if (needed > workspace_size_) {
      workspace_.reset();
      workspace_.reset(new double[needed]);  // not cleared
      workspace_size_ = needed;
    }
    double* free = workspace_.get();
    for (int64_t k = begin; k < end; ++k) {
      Prepared& one = prepared_[k];
      one.functions->prepare(one.job, control_->rows()[one.group], control_->inv_scale, free, one.memory);
      free += one.functions->workspace(one.job);
    }
    offsets_.resize(end - begin + 1);
    for (int phase = 0; phase < cpu::adafactor_phases; ++phase) {
      int64_t total = 0;
      for (int64_t k = begin; k < end; ++k) {
        offsets_[k - begin] = total;
        total += prepared_[k].functions->items(prepared_[k].memory, phase) *
                 prepared_[k].functions->cost(prepared_[k].memory, phase);
      }
      offsets_.back() = total;
      torch::stable::parallel_for(0, total, total > grain_elements ? 1 : grain_elements, [&](int64_t from, int64_t to) {
        run_range(phase, begin, from, to);
      });
    }
  }

  // The items of a phase that begin in a range of the costs laid end to end.
  void run_range(int phase, int64_t first, int64_t from, int64_t to) const {
    const auto found = std::upper_bound(offsets_.begin(), offsets_.end() - 1, from) - 1;
    for (int64_t i = found - offsets_.begin(); i + 1 < static_cast<int64_t>(offsets_.size()) && offsets_[i] < to; ++i) {
      const Prepared& one = prepared_[first + i];
      const int64_t items = one.functions->items(one.memory, phase), cost = one.functions->cost(one.memory, phase);
      if (!items) continue;
      const auto item = [&](int64_t at) {
        return at <= offsets_[i] ? 0 : std::min(items, (at - offsets_[i] + cost - 1) / cost);
      };
      one.functions->run(one.memory, phase, item(from), item(to));
    }
  }

  const core::Control* const control_;
  const cpu::Kernels& kernels_ = cpu::current_kernels();
  std::vector<Prepared> prepared_;
  std::vector<Extent> extents_;
  std::vector<int64_t> to_copy_;
  std::vector<Tensor> grad_copies_;
  std::unique_ptr<double[]> workspace_;
  int64_t workspace_size_ = 0;
  std::vector<int64_t> offsets_;  // of a wave's tensors in a phase, in cost; then the sum
};

void adafactor(StableIValue* stack, uint64_t, uint64_t) {
  const Lists lists{TensorList(stack[0]), TensorList(stack[1]), TensorList(stack[2]),
                    TensorList(stack[3]), TensorList(stack[4]), to<std::vector<int64_t>>(stack[5])};
  const Handle control(to<AtenTensorHandle>(stack[6]));
  stack[0] = from(Step(lists, control_view(control.get(), "_adafactor")).run());
}

}  // namespace
}  // namespace pytrain::ops

STABLE_TORCH_LIBRARY_FRAGMENT(pytrain, m) {
  m.def(
      "_adafactor(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] row_vars, Tensor(c!)[] col_vars, "
      "Tensor(d!)[] steps, int[] groups, Tensor control) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(pytrain, CompositeExplicitAutograd, m) { m.impl("_adafactor", &pytrain::ops::adafactor); }
