// A table: the state tensors of many parameters under one rule, kept between steps, and the step over them.
#pragma once

#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "core/control.h"
#include "core/segment.h"
#include "ops/tensor.h"

namespace pytrain::ops {

using core::Pair;

// Facts about a rule that the ops need; one entry a rule, in the order of rules::All.
struct RuleInfo {
  const char* name;
  const char* const* states;
  int n_states;
  bool counts;
};

class Table {
 public:
  static constexpr int64_t applied = -1;
  static constexpr int64_t skipped = -2;

  // states: n_states handles a row, row by row. steps: one a row where the rule counts, else none.
  Table(int rule, const RuleInfo& info, std::vector<Handle> states, std::vector<Handle> steps,
        std::vector<int64_t> groups);

  // One step over rows[k] for each k (all rows in their order if `rows` is empty).
  // Nothing that a former step saw of a tensor is trusted: addresses, sizes and strides are read anew.
  // Returns `applied`, `skipped`, or the first k whose tensors do not fit the table; then nothing was written.
  // With `strict` a misfit is an error with the reason; without `write` it is looked for and nothing else is done.
  int64_t step(const TensorList& params, const TensorList& grads, const std::vector<int64_t>& rows,
               const View& control, bool write, bool strict);
  // The same from facts that the caller has read. Tensors that must be copied first count as a misfit here.
  int64_t step(const Pair* pairs, int64_t n, const std::vector<int64_t>& rows, const View& control, bool write);

 private:
  enum class Misfit : int;
  struct Found {
    Misfit misfit;
    int64_t k;
  };
  void check_call(int64_t n, const std::vector<int64_t>& rows, const View& control) const;
  Found fit_all(const Pair* pairs, int64_t n, const std::vector<int64_t>& rows);
  Misfit fit(int64_t k, int64_t row, const Pair& pair, Format format);
  Misfit fit_states(int64_t row, const View& param, core::Segment& segment);
  std::string explain(Found found, const Pair& pair) const;
  bool find_shared_memory();
  int64_t run(const View& control);

  const int rule_;
  const RuleInfo info_;
  const std::vector<Handle> states_, steps_;
  const std::vector<int64_t> groups_;
  std::mutex busy_;
  // Scratch of one step, kept so that a step allocates nothing. A segment's grad and param may be staged copies.
  std::vector<core::Segment> segments_;
  std::vector<int64_t> offsets_;
  std::vector<float*> counts_;
  std::vector<uint8_t> staging_;
  Format format_ = Format::none;
  // Where the parameters lay when they were last compared with each other, and whether some share memory.
  std::vector<std::pair<const char*, const char*>> extents_;
  bool shared_ = false;
};

}  // namespace pytrain::ops
