// Looks whether the tensors of a step fit their table, and where they are, before anything is written.
#include <algorithm>
#include <utility>

#include "core/prefetch.h"
#include "ops/table.h"

namespace pytrain::ops {
namespace {

using core::Segment;

// The check of one row takes about as long as the update of a hundred elements.
constexpr int64_t grain_rows = 256;

std::string shape(const View& v) {
  std::string text = "(";
  for (int64_t d = 0; d < v.dim; ++d) text += (d ? ", " : "") + std::to_string(v.sizes[d]);
  return text + ")";
}

// What a step needs of a tensor beside a parameter: its memory, if it has this format and lies as the parameter does.
void* beside(AtenTensorHandle tensor, Format format, const View& param) {
  const Flat flat = read_flat(tensor);
  if (flat.format != format || flat.device != param.device) return nullptr;
  if (param.contiguous && flat.contiguous && param.numel == flat.numel) return flat.data;
  const View other = view(tensor, true);
  return other.usable && same_sizes(param, other) && same_strides(param, other) ? flat.data : nullptr;
}

// The memory of `numel` fp32 numbers in a row.
float* floats(AtenTensorHandle tensor, int64_t numel, int64_t device) {
  const Flat flat = read_flat(tensor);
  const bool good = flat.format == Format::fp32 && flat.device == device && flat.contiguous && flat.numel == numel;
  return good ? static_cast<float*>(flat.data) : nullptr;
}

}  // namespace

void Table::note_places() {
  const int64_t n = static_cast<int64_t>(kept_.groups.size());
  const std::vector<Handle>* const lists[] = {&kept_.states, &kept_.kept, &kept_.emas, &kept_.scalars, &kept_.steps};
  for (int64_t row = 0; row < n; ++row) {
    for (const std::vector<Handle>* const list : lists) {
      const int64_t each = static_cast<int64_t>(list->size()) / n;
      for (int64_t i = row * each; i < (row + 1) * each; ++i) {
        int64_t* sizes;
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes((*list)[i].get(), &sizes));
        places_.push_back({(*list)[i].get(), sizes});
      }
    }
  }
}

void Table::call_ahead(int64_t row) const {
  const size_t n = kept_.groups.size(), each = places_.size() / n;
  for (size_t i = row * each; i < (row + 1) * each; ++i) {
    core::prefetch(places_[i].handle);
    core::prefetch_flat(places_[i].sizes);
  }
}

Table::Misfit Table::fit_beside(int64_t k, int64_t row, const View& param) {
  Segment& segment = segments_[k];
  for (int s = 0; s < info_.n_states; ++s) {
    const AtenTensorHandle state = kept_.states[row * info_.n_states + s].get();
    segment.states[s] = beside(state, kept_as(storage_.states[s]), param);
    if (!segment.states[s] && param.numel) return Misfit::state;
  }
  return needs_extras_ ? fit_extra(k, row, param) : Misfit::none;
}

Table::Misfit Table::fit_extra(int64_t k, int64_t row, const View& param) {
  core::Extra& extra = extras_[k];
  extra.index = numbers_[k];
  extra.begin = kept_.parts.empty() ? 0 : kept_.parts[row * part_words + 1];
  extra.whole = kept_.parts.empty() ? param.numel : kept_.parts[row * part_words + 2];
  if (storage_.keep != core::Keep::nothing) {
    extra.kept = beside(kept_.kept[row].get(), kept_as(storage_.keep, param.format), param);
    if (!extra.kept && param.numel) return Misfit::kept;
  }
  if (storage_.ema) {
    extra.ema = beside(kept_.emas[row].get(), param.format == Format::fp64 ? Format::fp64 : Format::fp32, param);
    if (!extra.ema && param.numel) return Misfit::ema;
  }
  const int64_t n_codes = (param.numel + core::code_block - 1) / core::code_block;
  size_t scale = row * (kept_.scales.size() / kept_.groups.size());
  for (int s = 0; s < info_.n_states; ++s) {
    if (kept_as(storage_.states[s]) != Format::u8) continue;
    extra.scales[s] = floats(kept_.scales[scale++].get(), n_codes, device_);
    if (!extra.scales[s] && n_codes) return Misfit::scale;
  }
  for (int i = 0; i < info_.n_scalars; ++i) {
    float* const scalar = floats(kept_.scalars[row * info_.n_scalars + i].get(), 1, device_);
    if (!scalar) return Misfit::scalar;
    scalars_[k * info_.n_scalars + i] = scalar;
    if (!launches_) extra.scalars[i] = *scalar;
  }
  return Misfit::none;
}

Table::Misfit Table::fit(int64_t k, int64_t row, const Pair& pair) {
  const View &p = pair.param, &g = pair.grad;
  Segment& segment = segments_[k];
  staging_[k] = 0;
  numbers_[k] = kept_.parts.empty() ? row : kept_.parts[row * part_words];
  if (!p.usable || p.device != device_) return Misfit::param_kind;
  if (p.format != storage_.param) return Misfit::param_format;
  if (!g.usable || g.device != device_) return Misfit::grad_kind;
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
  segment.group = kept_.groups[row];
  if (!kept_.steps.empty()) {
    float* const count = floats(kept_.steps[row].get(), 1, device_);
    if (!count) return Misfit::step;
    counts_[k] = count;
    if (!launches_) segment.step = static_cast<double>(*count) + 1.0;
  }
  if (staging_[k] & stage_param) return Misfit::none;  // what is beside it is checked against the copy
  return fit_beside(k, row, p);
}

void Table::make_room(int64_t n) {
  segments_.resize(n);
  offsets_.resize(n);
  staging_.resize(n);
  numbers_.resize(n);
  block_sums_.resize(n);
  if (!kept_.steps.empty()) counts_.resize(n);
  if (needs_extras_) extras_.resize(n);
  scalars_.resize(n * info_.n_scalars);
}

bool Table::fit_rows(const Pair* pairs, int64_t begin, int64_t end, const std::vector<int64_t>& rows,
                     Misfits& misfits) {
  for (int64_t k = begin; k < end; ++k) {
    if (k + rows_ahead < end) call_ahead(rows.empty() ? k + rows_ahead : rows[k + rows_ahead]);
    const Misfit misfit = fit(k, rows.empty() ? k : rows[k], pairs[k]);
    if (misfit == Misfit::none) continue;
    const std::lock_guard<std::mutex> lock(misfits.one_at_a_time);
    if (k < misfits.first.k) misfits.first = {misfit, k};
    return false;
  }
  return true;
}

Table::Found Table::fit_all(const Pair* pairs, int64_t n, const std::vector<int64_t>& rows) {
  make_room(n);
  Misfits misfits(n);
  torch::stable::parallel_for(0, n, grain_rows,
                              [&](int64_t begin, int64_t end) { fit_rows(pairs, begin, end, rows, misfits); });
  if (misfits.first.misfit == Misfit::none) note_extents(rows);
  return misfits.first;
}

void Table::note_extents(const std::vector<int64_t>& rows) {
  bool moved = false;
  elements_ = 0;
  extents_.resize(kept_.groups.size());
  for (size_t k = 0; k < segments_.size(); ++k) {
    offsets_[k] = elements_;
    elements_ += segments_[k].numel;
    if (staging_[k] & stage_param) continue;  // updated in a copy
    const auto* const begin = static_cast<const char*>(segments_[k].param);
    const std::pair<const char*, const char*> extent{begin, begin + segments_[k].numel * core::bytes(storage_.param)};
    auto& remembered = extents_[rows.empty() ? k : rows[k]];
    moved |= remembered != extent;
    remembered = extent;
  }
  small_ = elements_ <= static_cast<int64_t>(segments_.size()) * cpu::block;
  if (moved) shared_ = find_shared_memory();
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
  const std::string device = device_ == cpu_device ? "the CPU" : "cuda:" + std::to_string(device_);
  const std::string at = "[" + std::to_string(found.k) + "]";
  switch (found.misfit) {
    case Misfit::param_kind:
      return "params" + at + " is not a strided tensor on " + device;
    case Misfit::param_format:
      return "params" + at +
             " has a dtype unlike the others', or one that is not float32, float64, bfloat16 or float16";
    case Misfit::overlap:
      return "params" + at + " has elements that share memory (for instance from expand()); pass a contiguous tensor";
    case Misfit::grad_kind:
      return "grads" + at + " is not a strided tensor on " + device;
    case Misfit::grad_shape:
      return "grads" + at + " has shape " + shape(pair.grad) + ", params" + at + " has " + shape(pair.param);
    case Misfit::grad_overlap:
      return "grads" + at +
             " has elements that share memory and cannot be zeroed in the step; pass a contiguous tensor";
    case Misfit::state:
      return "a state of params" + at + " has a shape, strides or a dtype unlike its, or is not on " + device;
    case Misfit::scale:
      return "the scales of a state of params" + at + " are not one float32 for 256 elements on " + device;
    case Misfit::kept:
      return "the master or compensation of params" + at + " has a shape, strides or a dtype that does not fit it";
    case Misfit::ema:
      return "the average of params" + at + " has a shape, strides or a dtype that does not fit it";
    case Misfit::scalar:
      return "a scalar of params" + at + " is not one float32 on " + device;
    case Misfit::step:
      return "step" + at + " is not one float32 on " + device;
    case Misfit::none:
      break;
  }
  return "all tensors fit";
}

}  // namespace pytrain::ops
