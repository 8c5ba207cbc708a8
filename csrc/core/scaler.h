// The loss scaler: how the scale moves after a step, and what a step's gradients are multiplied by. All its state is
// one small block on the device; every policy is the same few lines with other settings.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/control.h"

namespace pytrain::core {

// fp32, as torch keeps the scale: every scale is a number that the loss can be multiplied by without rounding it.
struct Scaler {
  float scale;
  float growth_tracker;    // clean steps since the last inf or growth
  float hysteresis_left;   // overflows that are left before one lowers the scale
  float skipped_in_a_row;
  float first_bad;         // the first bad parameter of the first of these steps, and which optimizer's it is
  float bad_optimizer;
};
constexpr int64_t scaler_size = sizeof(Scaler) / sizeof(float);

struct Policy {
  double growth_factor, backoff_factor;
  double growth_interval;      // clean steps in a row before the scale grows
  double hysteresis;           // overflows before the scale is lowered: at the first one where it is 1
  double min_scale, max_scale;
  double refills;              // not 0: every clean step refills the hysteresis (apex); else only growth (Megatron)
  double first_is_free;        // not 0: the first clean step after an overflow does not count (DeepSpeed)
};
constexpr int64_t policy_size = sizeof(Policy) / sizeof(double);

// The one update of a step. bad: whether any of its optimizers met an inf or nan.
PT_ANYWHERE inline void update(Scaler& s, const Policy& policy, bool bad, double first_bad, double bad_optimizer) {
  if (bad) {
    if (s.skipped_in_a_row == 0.0f) {
      s.first_bad = static_cast<float>(first_bad);
      s.bad_optimizer = static_cast<float>(bad_optimizer);
    }
    s.skipped_in_a_row += 1.0f;
    s.growth_tracker = 0.0f;
    s.hysteresis_left = s.hysteresis_left > 1.0f ? s.hysteresis_left - 1.0f : 0.0f;
    if (s.hysteresis_left > 0.0f) return;
    const float lower = static_cast<float>(static_cast<double>(s.scale) * policy.backoff_factor);
    const float floor = static_cast<float>(policy.min_scale);
    s.scale = lower > floor ? lower : s.scale < floor ? s.scale : floor;
    return;
  }
  s.skipped_in_a_row = 0.0f;
  if (policy.refills != 0.0) s.hysteresis_left = static_cast<float>(policy.hysteresis);
  s.growth_tracker += 1.0f;
  const double free = policy.first_is_free != 0.0 ? 1.0 : 0.0;
  if (static_cast<double>(s.growth_tracker) < policy.growth_interval + free) return;
  s.growth_tracker = static_cast<float>(free);
  s.hysteresis_left = static_cast<float>(policy.hysteresis);
  const float higher = static_cast<float>(static_cast<double>(s.scale) * policy.growth_factor);
  const float ceiling = static_cast<float>(policy.max_scale);
  const float limited = higher < ceiling ? higher : s.scale > ceiling ? s.scale : ceiling;
  if (limited <= std::numeric_limits<float>::max()) s.scale = limited;
}

// From pass 1 to pass 2: the control blocks of a step's optimizers get what multiplies their gradients. A scale of 0
// (torch's has no floor) or near it has no inverse in fp32; such a step is skipped.
PT_ANYWHERE inline void unscale(Control& control, double scale) {
  control.inv_scale /= scale;
  if (!(std::abs(control.inv_scale) <= static_cast<double>(std::numeric_limits<float>::max()))) {
    control.found_inf += 1.0;
  }
}

// A scale below 1 makes gradients larger. Where their norm leaves fp32 one of them may; such a step is skipped too.
PT_ANYWHERE inline bool overflows(const Control& control) {
  return control.inv_scale > 1.0 && !(control.grad_norm <= static_cast<double>(std::numeric_limits<float>::max()));
}

// As torch.nn.utils.clip_grad_norm_ has it.
PT_ANYWHERE inline double clip_coef(double norm, double max_norm) {
  const double coef = max_norm / (norm + 1e-6);
  return coef < 1.0 ? coef : 1.0;
}

// What follows from pass 1, for all control blocks of a step; each line of them belongs to a row there.
struct Settling {
  int64_t n_controls, n_groups;
  const int64_t* controls;     // addresses of the control blocks
  const int64_t* rows;         // of each, how many
  const int64_t* scaled;       // of each, whether the loss scale has multiplied its gradients
  const int64_t* clip_groups;  // of each row of all blocks, which of max_norms limits the norm of all rows of the same
                               // number; -1 for none
  const double* max_norms;
  double* room;                // two a clip group
};

PT_ANYWHERE inline Control& control_at(const Settling& s, int64_t i) {
  return *reinterpret_cast<Control*>(static_cast<std::uintptr_t>(s.controls[i]));
}

// The parts of `settle`, each a walk of its own that keeps little at hand. First: norms, and what unscales. A bad
// gradient leaves no norm.
PT_ANYWHERE inline void find_norms(const Settling& s, double scale) {
  for (int64_t i = 0; i < s.n_controls; ++i) {
    Control& head = control_at(s, i);
    if (s.scaled[i]) unscale(head, scale);
    double total = 0.0;
    for (int64_t r = 0; r < s.rows[i]; ++r) total += head.rows()[r].sumsq;
    const double nan = std::numeric_limits<double>::quiet_NaN();
    head.grad_norm = head.first_bad >= 0.0 ? nan : std::sqrt(total) * head.inv_scale;
    if (head.found_inf == 0.0 && overflows(head)) head.found_inf = 1.0;
  }
}

// Of each clip group the sum of the squares, and whether one of its optimizers has met an inf or nan: into the room.
PT_ANYWHERE inline void add_up_groups(const Settling& s) {
  for (int64_t g = 0; g < 2 * s.n_groups; ++g) s.room[g] = 0.0;
  int64_t at = 0;
  for (int64_t i = 0; i < s.n_controls; ++i) {
    const Control& head = control_at(s, i);
    for (int64_t r = 0; r < s.rows[i]; ++r, ++at) {
      const int64_t group = s.clip_groups[at];
      if (group < 0) continue;
      s.room[group] += head.rows()[r].sumsq * head.inv_scale * head.inv_scale;
      s.room[s.n_groups + group] += head.found_inf;
    }
  }
}

// Of each clip group the coefficient, in the sum's place.
PT_ANYWHERE inline void limit_groups(const Settling& s) {
  PT_ROLLED
  for (int64_t g = 0; g < s.n_groups; ++g) s.room[g] = clip_coef(std::sqrt(s.room[g]), s.max_norms[g]);
}

// Each row's; all optimizers that take part in a group with a bad gradient skip the step.
PT_ANYWHERE inline void limit_rows(const Settling& s) {
  int64_t at = 0;
  for (int64_t i = 0; i < s.n_controls; ++i) {
    Control& head = control_at(s, i);
    for (int64_t r = 0; r < s.rows[i]; ++r, ++at) {
      const int64_t group = s.clip_groups[at];
      head.rows()[r].clip_coef = group < 0 ? 1.0 : s.room[group];
      const double bad = group < 0 ? 0.0 : s.room[s.n_groups + group];
      if (bad != 0.0 && head.found_inf == 0.0) head.found_inf = bad;
    }
  }
}

// Norms, what unscales, and every row's clip coefficient from the norm of its clip group. Where a gradient of the group
// is bad there is no norm, and all optimizers that take part in it skip the step.
PT_ANYWHERE inline void settle(const Settling& s, double scale) {
  find_norms(s, scale);
  add_up_groups(s);
  limit_groups(s);
  limit_rows(s);
}

// What the control blocks of a step's optimizers mean for the scale.
PT_ANYWHERE inline void update(Scaler& s, const Policy& policy, const int64_t* controls, int64_t n_controls) {
  double first_bad = -1.0, bad_optimizer = -1.0;
  for (int64_t i = n_controls; i-- > 0;) {
    const Control& head = *reinterpret_cast<const Control*>(static_cast<std::uintptr_t>(controls[i]));
    if (head.found_inf == 0.0) continue;
    bad_optimizer = static_cast<double>(i);
    first_bad = head.first_bad;
  }
  update(s, policy, bad_optimizer >= 0.0, first_bad, bad_optimizer);
}

}  // namespace pytrain::core
