// A segment: the memory of one parameter as the loops see it. A list of tensors is many, a flat bucket is one.
#pragma once

#include <cstdint>

namespace pytrain::core {

constexpr int max_states = 4;

enum class Format : int { none = -1, fp32, fp64, bf16, fp16 };
constexpr int format_count = 4;

struct Segment {
  void* param;
  const void* grad;
  void* states[max_states];
  int64_t numel;
  int64_t group;   // row of the control block
  double step;     // the step count t of this update: 1 on the first
};

}  // namespace pytrain::core
