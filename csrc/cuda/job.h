// What a launch is told: tables of the parameters and of the chunks that they are cut into, in device memory.
#pragma once

#include <cstdint>

#include "core/control.h"
#include "core/scaler.h"
#include "core/segment.h"

namespace pytrain::cuda {

constexpr int threads = 256;      // of a thread block
constexpr int64_t chunk = 4096;   // elements that a thread block takes at a time, all of one parameter
static_assert(chunk % core::code_block == 0);

// One parameter. `memory.step` and `extra.scalars` are not used: the device has them behind pointers.
struct Item {
  core::Segment memory;
  core::Extra extra;
  float* count;                        // updates so far; null where nothing depends on it
  float* scalars[core::max_scalars];
  int64_t first_chunk, n_chunks;
};

struct Chunk {
  int64_t item, first;  // which parameter, and its first element
};

// What the host knows of a step, passed by value like the rest of a Job.
struct Settings {
  struct Row {
    double grad_sign, ema_weight;
    double hypers[core::max_hypers];
  };
  static constexpr int max_rows = 12;
  double inv_scale, clip_value;
  bool fresh;      // nothing of this step stands in the control block yet
  int64_t n_rows;  // 0: there are more than max_rows, and they stand in the control block
  Row rows[max_rows];
};

// Everything a kernel reads, passed by value.
struct Job {
  Settings settings;
  core::Storage storage;
  const Item* items;
  const Chunk* chunks;
  const int64_t* large;   // the items of more than `few_chunks` chunks
  int64_t n_items, n_chunks, n_large, n_rows;
  int64_t first_item, first_chunk;  // of the items and chunks that this launch takes; n_items and n_chunks are ends
  core::Control* control;
  double* partials;       // max_sums a chunk
  double* totals;         // max_sums an item
  unsigned* ticket;       // how many blocks of the running launch are done; 0 between launches
  double weight;          // of averages outside a step
  core::Scaler* scaler;   // what an update writes too, where it is all of a step; null: nothing
  const core::Scaler* moved;        // what it writes there: pass 1 has found it
};
constexpr int64_t few_chunks = 32;

}  // namespace pytrain::cuda
