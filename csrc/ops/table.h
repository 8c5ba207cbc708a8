// A table: the state tensors of many parameters under one rule, kept between steps, and the step over them.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "core/control.h"
#include "core/segment.h"
#include "cpu/table.h"
#include "ops/device.h"
#include "ops/host.h"
#include "ops/settle.h"
#include "ops/tensor.h"

namespace pytrain::ops {

using core::Pair;

// Facts about a rule that the ops need; one entry a rule, in the order of rules::All.
struct RuleInfo {
  const char* name;
  const char* const* states;
  int n_states;
  const char* const* scalars;
  int n_scalars;
  int n_sums;
  bool counts;
};

// How a segment's memory stands in for its tensors.
constexpr uint8_t stage_grad = 1;   // the gradient lies differently in memory, or has another dtype
constexpr uint8_t stage_param = 2;  // the parameter has gaps: it is updated in a copy without them

// Both kinds of 8-bit codes are kept as uint8.
inline Format kept_as(Format format) { return format == Format::s8 ? Format::u8 : format; }

inline Format kept_as(core::Keep keep, Format param) {
  return keep == core::Keep::master ? Format::fp32 : keep == core::Keep::low_bits ? Format::i16 : param;
}

// The tensors that a table keeps: for each row n_states states, one scale a state in 8-bit codes, what the storage
// keeps beside the parameter, its average, n_scalars scalars, and a step count where the rule or the storage needs one.
struct Kept {
  std::vector<Handle> states, scales, kept, emas, scalars, steps;
  // Nothing, or one: max_sums float64 a row, where Mode::sums leaves what the rule asks for over the k-th row of a
  // step, and from where a step then takes it. For rows that are parts of parameters: somebody adds up their sums.
  std::vector<Handle> sums;
  std::vector<int64_t> groups;
  // Three a row: which parameter it is, or is a part of, to the random numbers; with which element of that it begins;
  // and how many elements that has. May be empty.
  std::vector<int64_t> parts;
};

constexpr int64_t part_words = 3;

// A control block's facts, once it is known to be one.
View control_view(AtenTensorHandle control, const char* op);

// The control block of a step: on the table's device, and what the host knows of it.
struct Controls {
  View block;
  Given given;
  Between between;  // for Mode::settle; in pass 2 only the scaler that is to move as that has found
};

class Table {
 public:
  static constexpr int64_t applied = -1;
  static constexpr int64_t skipped = -2;
  static constexpr int64_t not_all = -3;
  // Check the tensors; also take the gradients' statistics, into the control block; and settle that in the same launch;
  // or take the sums of the rule; or step; or step what the last call, one for statistics or sums, has checked.
  enum class Mode : int { fit, stats, settle, sums, write, write_fitted };

  Table(int rule, const RuleInfo& info, const core::Storage& storage, int64_t device, Kept kept);

  // One step over rows[k] for each k (all rows in their order if `rows` is empty).
  // Nothing that a former step saw of a tensor is trusted: addresses, sizes and strides are read anew.
  // Returns `applied`, `skipped`, or the first k whose tensors do not fit the table; then nothing was written.
  // With `strict` a misfit is an error with the reason.
  int64_t step(const TensorList& params, const TensorList& grads, const std::vector<int64_t>& rows,
               const Controls& control, Mode mode, bool strict);
  // The same from facts that the caller has read. Tensors that must be copied first count as a misfit here.
  int64_t step(const Pair* pairs, int64_t n, const std::vector<int64_t>& rows, const Controls& control, Mode mode,
               const Beside& beside = {});
  // Mode::fit or Mode::stats over all rows from facts that are only now read: by `reading`, which fills in the pairs.
  // Small tensors are looked at while the next ones are read. Returns as `step`, or `not_all` where some were left out.
  int64_t gather(const Pair* pairs, int64_t n, const Gather& reading, const Controls& control, Mode mode);
  // Whether a captured graph may still step what is in this table.
  bool captured() const { return on_device_.captured(); }

 private:
  enum class Misfit : int {
    none,
    param_kind,
    param_format,
    overlap,
    grad_kind,
    grad_shape,
    grad_overlap,
    state,
    scale,
    kept,
    ema,
    scalar,
    step
  };
  struct Found {
    Misfit misfit;
    int64_t k;
  };
  // The first row that does not fit, of those that several threads look at.
  struct Misfits {
    explicit Misfits(int64_t n) : first{Misfit::none, n} {}
    Found first;
    std::mutex one_at_a_time;
  };
  // How many rows before its turn a row's tensors are called into the caches.
  static constexpr int64_t rows_ahead = 16;
  void note_places();
  void call_ahead(int64_t row) const;
  void check_call(int64_t n, const std::vector<int64_t>& rows, const View& control) const;
  Found fit_all(const Pair* pairs, int64_t n, const std::vector<int64_t>& rows);
  void make_room(int64_t n);
  // Ends with the first misfit, which it notes.
  bool fit_rows(const Pair* pairs, int64_t begin, int64_t end, const std::vector<int64_t>& rows, Misfits& misfits);
  void note_extents(const std::vector<int64_t>& rows);
  Misfit fit(int64_t k, int64_t row, const Pair& pair);
  Misfit fit_beside(int64_t k, int64_t row, const View& param);
  Misfit fit_extra(int64_t k, int64_t row, const View& param);
  std::string explain(Found found, const Pair& pair) const;
  bool find_shared_memory();
  int64_t run(const Controls& control, Mode mode, const Beside& beside = {});
  int64_t run_on_cpu(const View& control, Mode mode, const Beside& beside = {});
  void write(const cpu::Kernels& kernels, const cpu::Job& job, const Beside& beside);
  void count(int64_t begin, int64_t end);
  double* sums_between(int64_t n) const;
  void take_sums(const cpu::Kernels& kernels, const cpu::Job& job);
  bool sum_chunk(int64_t begin, int64_t end, std::vector<double>& partials);
  int64_t add_sums(core::Control& control);
  int64_t take_stats(const cpu::Kernels& kernels, const cpu::Job& job, core::Control& control);

  const int rule_;
  const RuleInfo info_;
  const core::Storage storage_;
  const int64_t device_;
  const bool launches_;  // it steps by launches of a device's kernels, and never reads what lies there
  const Kept kept_;
  const bool needs_extras_;
  int64_t last_group_ = 0;
  // Where the facts of a row's tensors lay when the table was made: only to call memory into the caches.
  struct Place {
    const void* handle;
    const void* sizes;
  };
  std::vector<Place> places_;
  std::mutex busy_;
  // Scratch of one step, kept so that a step allocates nothing. A segment's grad and param may be staged copies.
  std::vector<core::Segment> segments_;
  std::vector<core::Extra> extras_;
  std::vector<int64_t> offsets_, partial_offsets_;
  std::vector<double> partials_, block_sums_;  // the latter of a whole segment's blocks
  std::vector<float*> counts_;
  std::vector<float*> scalars_;
  std::vector<uint8_t> staging_;
  std::vector<int64_t> numbers_;  // which parameter each segment is
  // Where the parameters lay when they were last compared with each other, and whether some share memory.
  std::vector<std::pair<const char*, const char*>> extents_;
  bool shared_ = false;
  int64_t elements_ = 0;  // of the last step's tensors together,
  bool small_ = false;    // and whether they had a block on average, or less
  DeviceTable on_device_;
  std::vector<cuda::Item> items_;
  SettleArgument settled_;  // of the last pass 1 that settled: pass 2 reads from there where the loss scale moves
  const Pair* fitted_ = nullptr;  // what the last call has checked, if it was one for statistics
};

// The table of a number that _table gave.
std::shared_ptr<Table> find_table(int64_t id);
// The mode of a number; `folds`: whether the call may settle.
Table::Mode mode_from(int64_t number, bool folds);

}  // namespace pytrain::ops
