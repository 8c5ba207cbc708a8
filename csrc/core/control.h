// The control block: what a step needs to know besides the tensors, in one small block of doubles on the device.
#pragma once

#include <cstdint>

namespace pytrain::core {

constexpr int max_hypers = 14;

// One row a param group.
struct GroupRow {
  double grad_sign;            // -1 to maximize, else 1
  double ema_weight;           // how far a weight average moves to the parameter in a step; all the way in the first
  double hypers[max_hypers];   // the rule's Hyper, field by field
};

// The block's head; rows[group] follow it directly.
struct Control {
  double inv_scale;            // 1 / loss scale
  double found_inf;            // the step is skipped where this is not 0 (a sum over devices may exceed 1)
  const GroupRow* rows() const { return reinterpret_cast<const GroupRow*>(this + 1); }
};

constexpr int64_t control_head = sizeof(Control) / sizeof(double);
constexpr int64_t control_row = sizeof(GroupRow) / sizeof(double);

}  // namespace pytrain::core
