// What a library of kernels for a device offers to csrc/ops, which loads it by address and links nothing of it: CUDA's,
// or the same kernels on the CPU (tests/simt).
#pragma once

#include <cstdint>

#include "core/control.h"
#include "core/scaler.h"
#include "cuda/job.h"

namespace pytrain::cuda {

// A few numbers for one block, by value where they are few.
struct Words {
  static constexpr int64_t few = 192;
  int64_t n;
  const int64_t* many;  // device memory; null where they stand here
  int64_t here[few];
};

// Pass 1 to pass 2, as in csrc/ops/step.cpp. `words` holds, in this order: each control block's address, its number of
// rows, whether it is scaled; each row's clip group; each group's max_norm as the bits of a double; and room for two
// doubles a group.
struct Settle {
  Words words;
  const float* scale;
  int64_t n_controls, n_rows, n_groups;
  double* room;  // two doubles a group, in device memory
  const core::Scaler* scaler;  // null where `moved` is not asked for: the state after this step
  core::Scaler* moved;
  core::Policy policy;
};
static_assert(sizeof(Job) + sizeof(Settle) <= 4096, "what a launch takes by value on every driver");

// `words` holds each control block's address.
struct ScalerUpdate {
  Words words;
  core::Scaler* state;
  core::Policy policy;
  int64_t n_controls;
};

// 4000 bytes that a launch carries to the device: nothing waits, and a captured graph holds them itself.
struct Piece {
  static constexpr int64_t max_words = 500;
  int64_t n;
  int64_t words[max_words];
};

// Copies between two formats, handed over by value: nothing is uploaded or kept, and a captured graph holds them.
struct Copies {
  static constexpr int64_t most = 120;
  struct Pair {
    void* to;
    const void* from;
    int64_t numel, first_chunk;  // at least one element; chunks are counted over all pairs
  };
  core::Format to_format, from_format;
  double scale;
  int64_t accumulate;  // add to what stands there
  int64_t n, n_chunks;
  Pair pairs[most];
};
static_assert(sizeof(Copies) <= 4096, "what a launch carries");

enum class Class : int { fp32, fp64, mixed };

// Launches return nothing, or why they failed.
struct Backend {
  int64_t bytes;  // bytes_of_build: both sides must be of the same build
  // Calls body(stream, context) with this device current and the stream that work is queued on now.
  void (*on_device)(int64_t device, void (*body)(void* stream, void* context), void* context);
  int64_t (*multiprocessors)(int64_t device);  // launches take as many blocks as these hold at a time
  // Which capture makes a graph of what is queued on this stream now; 0: none, it runs.
  uint64_t (*capture)(void* stream);
  const char* (*step)(Class kind, int rule, bool measure, const Job& job, int64_t multiprocessors, void* stream);
  // Pass 1, and what follows from it where `then` has a control block.
  const char* (*stats)(const Job& job, const Settle& then, int64_t multiprocessors, void* stream);
  const char* (*average)(const Job& job, int64_t multiprocessors, void* stream);
  const char* (*copy)(const Copies& job, int64_t multiprocessors, void* stream);
  const char* (*upload)(const Piece& piece, void* to, void* stream);
  const char* (*settle)(const Settle& job, void* stream);
  const char* (*update_scaler)(const ScalerUpdate& job, void* stream);
};

const char* launch_fp32(int rule, bool measure, const Job& job, int64_t multiprocessors, void* stream);
const char* launch_fp64(int rule, bool measure, const Job& job, int64_t multiprocessors, void* stream);
const char* launch_mixed(int rule, bool measure, const Job& job, int64_t multiprocessors, void* stream);
const char* launch_stats(const Job& job, const Settle& then, int64_t multiprocessors, void* stream);
const char* launch_average(const Job& job, int64_t multiprocessors, void* stream);
const char* launch_copy(const Copies& job, int64_t multiprocessors, void* stream);
const char* launch_upload(const Piece& piece, void* to, void* stream);
const char* launch_settle(const Settle& job, void* stream);
const char* launch_scaler(const ScalerUpdate& job, void* stream);

// Differs where what both sides share does.
constexpr int64_t bytes_of_build = sizeof(Job) + sizeof(Backend);

inline const char* launch_step(Class kind, int rule, bool measure, const Job& job, int64_t multiprocessors,
                               void* stream) {
  switch (kind) {
    case Class::fp32:
      return launch_fp32(rule, measure, job, multiprocessors, stream);
    case Class::fp64:
      return launch_fp64(rule, measure, job, multiprocessors, stream);
    default:
      return launch_mixed(rule, measure, job, multiprocessors, stream);
  }
}

}  // namespace pytrain::cuda
