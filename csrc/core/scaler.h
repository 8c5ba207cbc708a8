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
inline void update(Scaler& s, const Policy& policy, bool bad, double first_bad, double bad_optimizer) {
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
inline void unscale(Control& control, double scale) {
  control.inv_scale /= scale;
  if (!(std::abs(control.inv_scale) <= static_cast<double>(std::numeric_limits<float>::max()))) {
    control.found_inf += 1.0;
  }
}

// A scale below 1 makes gradients larger. Where their norm leaves fp32 one of them may; such a step is skipped too.
inline bool overflows(const Control& control) {
  return control.inv_scale > 1.0 && !(control.grad_norm <= static_cast<double>(std::numeric_limits<float>::max()));
}

// As torch.nn.utils.clip_grad_norm_ has it.
inline double clip_coef(double norm, double max_norm) {
  const double coef = max_norm / (norm + 1e-6);
  return coef < 1.0 ? coef : 1.0;
}

}  // namespace pytrain::core
