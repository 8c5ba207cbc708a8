// The control block: what a step needs to know besides the tensors, in one small block of doubles on the device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PT_ANYWHERE __host__ __device__
#else
#define PT_ANYWHERE
#endif
#ifdef __CUDA_ARCH__
#define PT_ROLLED _Pragma("unroll 1")
#else
#define PT_ROLLED
#endif

namespace pytrain::core {

constexpr int max_hypers = 14;

// One row a param group.
struct GroupRow {
  double grad_sign;            // -1 to maximize, else 1
  double ema_weight;           // how far a weight average moves to the parameter in a step
  double clip_coef;            // what clipping by norm leaves of a gradient, 0 to 1
  double sumsq;                // the sum of the squares of the group's gradients as they lie in memory, still scaled
  double hypers[max_hypers];   // the rule's Hyper, field by field
};

// The block's head; rows[group] follow it directly.
struct Control {
  double inv_scale;            // 1 / (loss scale * weight of the micro-batches)
  double found_inf;            // the step is skipped where this is not 0 (a sum over devices may exceed 1)
  double clip_value;           // unscaled gradients are clamped to [-clip_value, clip_value]; 0 leaves them
  double grad_norm;            // of all unscaled gradients of the optimizer
  double first_bad;            // the number of the first parameter with an inf or nan gradient; -1 without one
  PT_ANYWHERE GroupRow* rows() { return reinterpret_cast<GroupRow*>(this + 1); }
  PT_ANYWHERE const GroupRow* rows() const { return reinterpret_cast<const GroupRow*>(this + 1); }
};

constexpr int64_t control_head = sizeof(Control) / sizeof(double);
constexpr int64_t control_row = sizeof(GroupRow) / sizeof(double);

}  // namespace pytrain::core
