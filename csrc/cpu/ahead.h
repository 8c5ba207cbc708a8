// Calls into the caches what the walk over segments comes to next; nothing here changes a result. Included once an
// instruction set, after tiles.h and before storage.h.
#pragma once

namespace pytrain::PT_ISA::cpu {

using pytrain::cpu::Job;

// How much of the gradient after that of segment i: the hardware follows a stream, but not from one tensor to the next.
constexpr int64_t ahead_bytes = 4096;
constexpr int64_t line_bytes = 64;

// Pass 2 does without: it is held up by what it writes.
inline void call_next_grad(const Job& job, int64_t i) {
  if (i + 1 >= job.n_segments) return;
  const pytrain::core::Segment& next = job.segments[i + 1];
  const int64_t bytes = next.numel * pytrain::core::bytes(job.storage.param);
  const char* const at = static_cast<const char*>(next.grad);
  for (int64_t b = 0; b < (bytes < ahead_bytes ? bytes : ahead_bytes); b += line_bytes) pytrain::core::prefetch(at + b);
}

}  // namespace pytrain::PT_ISA::cpu
