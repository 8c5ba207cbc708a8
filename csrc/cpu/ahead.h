// Calls into the caches what the walk over segments comes to next; nothing here changes a result. Included once an
// instruction set, after tiles.h and before storage.h.
#pragma once

namespace pytrain::PT_ISA::cpu {

using pytrain::cpu::Job;

// How far the hardware is helped into a tensor: it follows a stream once it has seen a few lines of it.
constexpr int64_t ahead_bytes = 1024;
constexpr int64_t line_bytes = 64;

inline void call(const void* memory, int64_t bytes) {
  const char* const at = static_cast<const char*>(memory);
  if (bytes > ahead_bytes) bytes = ahead_bytes;
  for (int64_t b = 0; b < bytes; b += line_bytes) __builtin_prefetch(at + b);
}

// The beginning of the gradient after that of segment i.
inline void call_next_grad(const Job& job, int64_t i) {
  if (i + 1 >= job.n_segments) return;
  const pytrain::core::Segment& next = job.segments[i + 1];
  call(next.grad, next.numel * pytrain::core::bytes(job.storage.param));
}

// The beginnings of what a step reads of the segment after i.
inline void call_next(const Job& job, int64_t i) {
  call_next_grad(job, i);
  if (i + 1 >= job.n_segments) return;
  const pytrain::core::Segment& next = job.segments[i + 1];
  call(next.param, next.numel * pytrain::core::bytes(job.storage.param));
  for (int s = 0; s < job.rule->states; ++s) {
    call(next.states[s], next.numel * pytrain::core::bytes(job.storage.states[s]));
  }
  if (job.storage.ema) call(job.extras[i + 1].ema, next.numel * static_cast<int64_t>(sizeof(float)));
}

}  // namespace pytrain::PT_ISA::cpu
