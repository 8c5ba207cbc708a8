// What every instruction set offers: one function a (rule, format), over a range of the flattened elements.
#pragma once

#include <cstdint>

#include "core/control.h"
#include "core/segment.h"

namespace pytrain::cpu {

// Updates elements [begin, end) of the segments laid end to end; segment i starts at element offsets[i].
using StepFn = void (*)(const core::Segment* segments, const int64_t* offsets, int64_t n_segments,
                        const core::Control* control, int64_t begin, int64_t end);

constexpr int max_rules = 64;

struct Kernels {
  StepFn step[max_rules][core::format_count];
};

}  // namespace pytrain::cpu
