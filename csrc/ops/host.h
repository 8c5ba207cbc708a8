// Calls into the kernel library without torch's dispatcher, which costs more than a small step does: for what lies in
// host memory whole. The Python module learns where they are from an op and passes facts and addresses.
#pragma once

#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "core/control.h"
#include "core/layout.h"
#include "core/scaler.h"

namespace pytrain::ops {

// Reads pairs, one after the other on the thread that calls it, and says in `read` how many it has; -1 where it leaves
// one out. Throws nothing.
struct Gather {
  void (*run)(void* context, std::atomic<int64_t>& read);
  void* context;
};

// What the calling thread does first while others begin to step. Throws nothing.
struct Beside {
  void (*run)(void* context) = nullptr;
  void* context = nullptr;
};

// Arguments are checked as those of the ops that the comments name; errors are std::runtime_error.
struct HostCalls {
  // _table_step_pairs of a table on the CPU whose kernels are not launched; `numbers`: of the control block.
  int64_t (*step)(int64_t table, const core::Pair* pairs, int64_t n, const std::vector<int64_t>& rows,
                  core::Control* control, int64_t numbers, int64_t mode, const Beside& beside);
  // The same over all rows, with pairs that are still to be read: Table::gather.
  int64_t (*gather)(int64_t table, const core::Pair* pairs, int64_t n, const Gather& gather, core::Control* control,
                    int64_t numbers, int64_t mode);
  // _control; blocks: of each control block its address and the number of its rows.
  void (*settle)(const std::vector<std::pair<core::Control*, int64_t>>& blocks, float scale,
                 const std::vector<int64_t>& scaled, const std::vector<int64_t>& clip_groups,
                 const std::vector<double>& max_norms);
  // _scaler_update; returns whether the scale is another one now.
  bool (*update_scaler)(core::Scaler* scaler, const core::Policy& policy, const std::vector<int64_t>& controls);
};

}  // namespace pytrain::ops
