// Checks every tensor of a step before anything is written, then runs one parallel region over all their elements.
#include "ops/table.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "cpu/dispatch.h"

namespace pytrain::ops {
namespace {

using core::Segment;
using torch::stable::Tensor;

// Below this many elements a second thread costs more than it brings where gradients are only read: 300 tensors of 256
// took 16 us on one thread and 20 on two. An update moves several times the bytes: 62 us and 39.
constexpr int64_t grain_elements = 131072, grain_written = 65536;
// Of an update of small tensors; more of them, and the hardware follows its streams less far.
constexpr int64_t pieces_a_thread = 8;

int64_t n_blocks(const Segment& segment) { return cpu::blocks_of(segment.numel); }

// Writes zeros through any strides; elements that share memory are written more than once.
void fill_with_zeros(const View& v, int64_t dim, char* at) {
  const int64_t size = core::bytes(v.format);
  if (dim == v.dim) {
    for (int64_t i = 0; i < size; ++i) at[i] = 0;
    return;
  }
  for (int64_t i = 0; i < v.sizes[dim]; ++i) fill_with_zeros(v, dim + 1, at + i * v.strides[dim] * size);
}

}  // namespace

View control_view(AtenTensorHandle control, const char* op) {
  const View v = view(control, false);
  STD_TORCH_CHECK(v.usable && v.contiguous && v.format == Format::fp64 &&
                      v.numel >= core::control_head + core::control_row &&
                      (v.numel - core::control_head) % core::control_row == 0,
                  op, "_: control must be a contiguous float64 tensor of ", core::control_head, " + ",
                  core::control_row, " x (param groups) elements");
  return v;
}

Table::Table(int rule, const RuleInfo& info, const core::Storage& storage, int64_t device, Kept kept)
    : rule_(rule),
      info_(info),
      storage_(storage),
      device_(device),
      launches_(backend_of(device) != nullptr),
      kept_(std::move(kept)),
      needs_extras_(info.n_scalars > 0 || info.n_sums > 0 || storage.needs_extras(info.n_states)) {
  const size_t n = kept_.groups.size();
  const auto check = [&](const char* what, size_t found, int64_t each) {
    STD_TORCH_CHECK(found == n * each, info_.name, "_: expected ", n * each, " ", what, " (", each, " for each of ", n,
                    " groups), got ", found);
  };
  int64_t coded = 0;
  for (int s = 0; s < info_.n_states; ++s) {
    const Format format = storage_.states[s];
    coded += kept_as(format) == Format::u8;
    STD_TORCH_CHECK((storage_.param == Format::fp64) == (format == Format::fp64), info_.name,
                    "_: float64 parameters and states go together");
  }
  const bool half = storage_.param == Format::bf16 || storage_.param == Format::fp16;
  STD_TORCH_CHECK(half || (storage_.keep == core::Keep::nothing), info_.name,
                  "_: only bfloat16 and float16 parameters have masters or a compensation");
  STD_TORCH_CHECK(storage_.keep != core::Keep::low_bits || storage_.param == Format::bf16, info_.name,
                  "_: only bfloat16 parameters are the upper half of a float32");
  check("states", kept_.states.size(), info_.n_states);
  check("scales", kept_.scales.size(), coded);
  check("kept", kept_.kept.size(), storage_.keep != core::Keep::nothing);
  check("emas", kept_.emas.size(), storage_.ema);
  check("scalars", kept_.scalars.size(), info_.n_scalars);
  const bool counts = info_.counts || storage_.ema_by_count || storage_.stochastic;
  STD_TORCH_CHECK(kept_.steps.size() == n || !counts, info_.name, "_: expected ", n, " steps, got ",
                  kept_.steps.size());
  check("steps", kept_.steps.size(), !kept_.steps.empty());
  check("parts", kept_.parts.size(), kept_.parts.empty() ? 0 : part_words);
  for (size_t row = 0; storage_.stochastic && row * part_words < kept_.parts.size(); ++row) {
    const int64_t begin = kept_.parts[row * part_words + 1];
    STD_TORCH_CHECK(storage_.param == Format::fp64 || begin % core::random_tile == 0, info_.name, "_: parts[", row,
                    "] begins with element ", begin, " of its parameter, expected a multiple of ", core::random_tile,
                    " (they share random numbers)");
  }
  for (size_t row = 0; row < n; ++row) {
    STD_TORCH_CHECK(kept_.groups[row] >= 0, info_.name, "_: groups[", row, "] is ", kept_.groups[row],
                    ", expected >= 0");
    last_group_ = std::max(last_group_, kept_.groups[row]);
  }
  note_places();
}

void Table::check_call(int64_t n, const std::vector<int64_t>& rows, const View& control) const {
  const int64_t all = static_cast<int64_t>(kept_.groups.size());
  STD_TORCH_CHECK(control.device == device_, info_.name, "_: control is not on the parameters' device");
  const int64_t expected = rows.empty() ? all : static_cast<int64_t>(rows.size());
  STD_TORCH_CHECK(n == expected, info_.name, "_: params has ", n, " tensors, expected ", expected);
  const int64_t control_rows = (control.numel - core::control_head) / core::control_row;
  if (rows.empty() && last_group_ < control_rows) return;
  for (int64_t k = 0; k < n; ++k) {
    const int64_t row = rows.empty() ? k : rows[k];
    STD_TORCH_CHECK(row >= 0 && row < all, info_.name, "_: rows[", k, "] is ", row, ", expected 0 to ", all - 1);
    STD_TORCH_CHECK(kept_.groups[row] < control_rows, info_.name, "_: groups[", row, "] is ", kept_.groups[row],
                    ", control has ", control_rows, " rows");
  }
}

// Where the sums of n rows stand between two calls; null where one call takes them and steps.
double* Table::sums_between(int64_t n) const {
  if (kept_.sums.empty()) return nullptr;
  const View v = view(kept_.sums[0].get(), false);
  STD_TORCH_CHECK(v.usable && v.contiguous && v.format == Format::fp64 && v.device == device_ &&
                      v.numel >= n * core::max_sums,
                  info_.name, "_: sums must be a contiguous float64 tensor of at least ", n * core::max_sums,
                  " elements on the parameters' device, has ", v.numel);
  return static_cast<double*>(v.data);
}

void Table::take_sums(const cpu::Kernels& kernels, const cpu::Job& job) {
  const auto range = [&](int64_t begin, int64_t end) { kernels.measure(job, begin, end); };
  if (shared_) {
    range(0, elements_);
  } else {
    torch::stable::parallel_for(0, elements_, elements_ > grain_elements ? 1 : grain_elements, range);
  }
  for (int64_t k = 0; k < job.n_segments; ++k) {
    const double* const partials = partials_.data() + partial_offsets_[k];
    for (int i = 0; i < info_.n_sums; ++i) {
      double sum = 0.0;
      for (int64_t b = 0; b < n_blocks(segments_[k]); ++b) sum += partials[b * info_.n_sums + i];
      extras_[k].sums[i] = sum;
    }
  }
}

int64_t Table::take_stats(const cpu::Kernels& kernels, const cpu::Job& job, core::Control& control) {
  torch::stable::parallel_for(0, elements_, elements_ > grain_elements ? 1 : grain_elements,
                              [&](int64_t begin, int64_t end) { kernels.stats(job, begin, end); });
  for (int64_t k = 0; k < job.n_segments; ++k) {
    block_sums_[k] = cpu::total(partials_.data() + partial_offsets_[k], n_blocks(segments_[k]));
  }
  return add_sums(control);
}

// Adds to what other tables of the same step have found.
int64_t Table::add_sums(core::Control& control) {
  int64_t result = applied;
  for (size_t k = 0; k < segments_.size(); ++k) {
    const double sum = block_sums_[k];
    if (sum == sum) {
      control.rows()[segments_[k].group].sumsq += sum;
      continue;
    }
    result = skipped;
    const double number = static_cast<double>(numbers_[k]);
    control.found_inf = 1.0;
    control.first_bad = control.first_bad < 0.0 || number < control.first_bad ? number : control.first_bad;
  }
  return result;
}

int64_t Table::run(const Controls& control, Mode mode, const Beside& beside) {
  STD_TORCH_CHECK(mode != Mode::sums || (info_.n_sums && !kept_.sums.empty()), info_.name,
                  "_: mode is 3, but the table has no room for sums, or the rule takes none");
  if (!launches_) return run_on_cpu(control.block, mode, beside);
  items_.resize(segments_.size());
  for (size_t k = 0; k < segments_.size(); ++k) {
    cuda::Item& item = items_[k];
    item = {};
    item.memory = segments_[k];
    if (needs_extras_) item.extra = extras_[k];
    item.extra.index = numbers_[k];
    item.count = kept_.steps.empty() ? nullptr : counts_[k];
    for (int i = 0; i < info_.n_scalars; ++i) item.scalars[i] = scalars_[k * info_.n_scalars + i];
  }
  Queue queue(device_);
  const int64_t n_rows = (control.block.numel - core::control_head) / core::control_row;
  const core::Scaler* const scaler = control.between.scaler;
  STD_TORCH_CHECK(mode < Mode::write || !scaler || settled_.job.scaler == scaler, info_.name,
                  "_: no pass 1 has found where this scaler moves");
  if (mode == Mode::settle) settled_ = SettleArgument(queue, control.between);
  const cuda::Settle then = mode == Mode::settle ? settled_.job : cuda::Settle{};
  run_on_device(queue, on_device_, items_,
                {rule_, info_.n_sums > 0, shared_, storage_, static_cast<core::Control*>(control.block.data), n_rows,
                 control.given, &then, control.between.scaler, settled_.job.moved,
                 sums_between(static_cast<int64_t>(segments_.size()))},
                mode == Mode::sums ? Launches::sums : mode < Mode::write ? Launches::stats : Launches::update);
  // What it has found holds for one step.
  if (mode != Mode::settle && mode != Mode::sums) settled_.job.scaler = nullptr;
  return applied;
}

// Writes the step counts of the segments that begin in a range of all elements.
void Table::count(int64_t begin, int64_t end) {
  if (kept_.steps.empty()) return;
  auto k = std::lower_bound(offsets_.begin(), offsets_.end(), begin) - offsets_.begin();
  for (; k < static_cast<int64_t>(segments_.size()) && (offsets_[k] < end || end == elements_); ++k) {
    *counts_[k] = static_cast<float>(segments_[k].step);
  }
}

// Pieces of many small tensors go to whoever is free; of large ones each thread has the same part in every step, which
// then stays in the memory near it.
void Table::write(const cpu::Kernels& kernels, const cpu::Job& job, const Beside& beside) {
  const auto range = [&](int64_t begin, int64_t end) { kernels.step(job, begin, end); };
  const int64_t total = elements_;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), 1 + total / grain_written);
  const bool shares = !shared_ && small_ && threads > 1;  // parameters in the same memory step one after the other
  if (!shares) {
    if (beside.run) beside.run(beside.context);
    if (shared_) {
      range(0, total);
    } else {
      torch::stable::parallel_for(0, total, total > grain_written ? 1 : grain_written, range);
    }
    return count(0, total);
  }
  const int64_t piece = total / (pieces_a_thread * threads) + 1;
  std::atomic<int64_t> taken{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
    if (first == 0 && beside.run) beside.run(beside.context);
    // From the last to the first: the gradients that pass 1 has read last are still near.
    for (int64_t past; (past = taken.fetch_add(piece)) < total;) {
      const int64_t begin = std::max<int64_t>(0, total - past - piece);
      range(begin, total - past);
      count(begin, total - past);
    }
  });
}

int64_t Table::run_on_cpu(const View& control, Mode mode, const Beside& beside) {
  STD_TORCH_CHECK(mode != Mode::settle, info_.name, "_: only launches settle a control block in pass 1");
  auto* const block = static_cast<core::Control*>(control.data);
  if (mode != Mode::stats && block->found_inf != 0.0) return skipped;
  const int64_t n = static_cast<int64_t>(segments_.size());
  const int64_t sums = mode == Mode::stats ? 1 : info_.n_sums;
  int64_t n_partials = 0;
  partial_offsets_.resize(sums ? n : 0);
  for (int64_t k = 0; sums && k < n; ++k) {
    partial_offsets_[k] = n_partials;
    n_partials += n_blocks(segments_[k]) * sums;
  }
  partials_.resize(n_partials);
  const cpu::Kernels& kernels = cpu::current_kernels();
  const cpu::RuleFunctions& rule = kernels.rules[rule_];
  const cpu::Job job{&rule,
                     storage_,
                     segments_.data(),
                     needs_extras_ ? extras_.data() : nullptr,
                     offsets_.data(),
                     n,
                     block,
                     partial_offsets_.data(),
                     partials_.data()};
  if (mode == Mode::stats) return take_stats(kernels, job, *block);
  double* const between = sums_between(n);
  if (info_.n_sums && (mode == Mode::sums || !between)) take_sums(kernels, job);
  for (int64_t k = 0; between && k < n; ++k) {
    double* const own = extras_[k].sums;
    if (mode == Mode::sums) {
      std::copy(own, own + core::max_sums, between + k * core::max_sums);
    } else {
      std::copy(between + k * core::max_sums, between + (k + 1) * core::max_sums, own);
    }
  }
  if (mode == Mode::sums) return applied;
  write(kernels, job, beside);
  for (int64_t k = 0; k < n && rule.advance; ++k) {
    core::Extra& extra = extras_[k];
    rule.advance(block->rows()[segments_[k].group], segments_[k].step, extra.scalars, extra.sums);
    for (int i = 0; i < info_.n_scalars; ++i) {
      *scalars_[k * info_.n_scalars + i] = static_cast<float>(extra.scalars[i]);
    }
  }
  return applied;
}

int64_t Table::step(const Pair* pairs, int64_t n, const std::vector<int64_t>& rows, const Controls& control,
                    Mode mode, const Beside& beside) {
  const std::unique_lock<std::mutex> alone(busy_, std::try_to_lock);
  STD_TORCH_CHECK(alone.owns_lock(), info_.name, "_: two threads step the same parameters at once");
  check_call(n, rows, control.block);
  const bool fitted = mode == Mode::write_fitted && fitted_ == pairs && static_cast<int64_t>(segments_.size()) == n;
  fitted_ = nullptr;
  if (!fitted) {
    const Found found = fit_all(pairs, n, rows);
    if (found.misfit != Misfit::none) return found.k;
    for (int64_t k = 0; k < n; ++k) {
      if (staging_[k]) return k;
    }
  }
  if (mode > Mode::fit && mode < Mode::write) fitted_ = pairs;
  return mode == Mode::fit ? applied : run(control, mode, beside);
}

int64_t Table::step(const TensorList& params, const TensorList& grads, const std::vector<int64_t>& rows,
                    const Controls& control, Mode mode, bool strict) {
  const std::unique_lock<std::mutex> alone(busy_, std::try_to_lock);
  STD_TORCH_CHECK(alone.owns_lock(), info_.name, "_: two threads step the same parameters at once");
  fitted_ = nullptr;
  const int64_t n = params.size();
  STD_TORCH_CHECK(grads.size() == n, info_.name, "_: grads has ", grads.size(), " tensors, params has ", n);
  check_call(n, rows, control.block);
  std::vector<Pair> pairs(n);
  for (int64_t k = 0; k < n; ++k) pairs[k] = {view(params[k], true), view(grads[k], storage_.zero_grad)};
  Found found = fit_all(pairs.data(), n, rows);

  // Copies of the few tensors that lie in memory in a way the loop does not walk.
  std::vector<std::pair<Tensor, Tensor>> write_back;  // (parameter, its updated copy)
  std::vector<Tensor> grad_copies;
  for (int64_t k = 0; found.misfit == Misfit::none && k < n; ++k) {
    if (!staging_[k]) continue;
    if (launches_ && storage_.zero_grad && !evidently_disjoint(pairs[k].grad)) found = {Misfit::grad_overlap, k};
    const Tensor p = share(params[k]).take(), g = share(grads[k]).take();
    Tensor grad_copy = torch::stable::empty_like(p);
    torch::stable::copy_(grad_copy, g);
    segments_[k].grad = grad_copy.mutable_data_ptr();
    grad_copies.push_back(grad_copy);
    if (staging_[k] & stage_param) {
      Tensor copy = torch::stable::empty_like(p);
      torch::stable::copy_(copy, p);
      segments_[k].param = copy.mutable_data_ptr();
      const Misfit misfit = fit_beside(k, rows.empty() ? k : rows[k], view(copy.get(), true));
      if (misfit != Misfit::none) found = {misfit, k};
      write_back.emplace_back(p, copy);
    }
  }
  if (found.misfit != Misfit::none) {
    STD_TORCH_CHECK(!strict, info_.name, "_: ", explain(found, pairs[found.k]));
    return found.k;
  }
  const int64_t result = mode == Mode::fit ? applied : run(control, mode);
  if (mode < Mode::write || result != applied) return result;
  for (auto& [param, copy] : write_back) torch::stable::copy_(param, copy);
  size_t at = 0;
  for (int64_t k = 0; storage_.zero_grad && k < n; ++k) {
    if (!staging_[k]) continue;
    if (launches_) {  // zeros, or what it was where the step is skipped
      Tensor grad = share(grads[k]).take();
      torch::stable::copy_(grad, grad_copies[at++]);
    } else {
      fill_with_zeros(pairs[k].grad, 0, static_cast<char*>(pairs[k].grad.data));
    }
  }
  return result;
}

}  // namespace pytrain::ops
