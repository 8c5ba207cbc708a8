// The control blocks of a step between its passes, and the argument of a launch that settles them: one of its own, or
// pass 1's.
#pragma once

#include <cstdint>
#include <vector>

#include "core/scaler.h"
#include "ops/device.h"

namespace pytrain::ops {

// What follows from pass 1 for these control blocks.
struct Between {
  struct Block {
    core::Control* head;
    int64_t rows;
  };
  std::vector<Block> blocks;
  std::vector<int64_t> scaled;       // of each, whether the loss scale has multiplied its gradients
  std::vector<int64_t> clip_groups;  // of each row of all blocks, which of max_norms limits it; -1 for none
  std::vector<double> max_norms;
  const float* scale = nullptr;      // where the blocks are; null where none is scaled
  core::Scaler* scaler = nullptr;    // what this step is to move, in pass 2; null: nothing
  core::Policy policy{};

  int64_t n_rows() const;
  void check(const char* op) const;
  // Addresses, rows, scaled, clip groups and limits one after the other, as cuda::Settle has them.
  std::vector<int64_t> words() const;
};

int64_t word(const void* address);

// Hands words to a launch: by value, or in device memory that `room` then owns.
void hand_over(Queue& queue, const std::vector<int64_t>& words, cuda::Words& to, Handle& room);

// What a launch is told, and the device memory that this points to.
struct SettleArgument {
  cuda::Settle job{};
  Handle words, room;

  SettleArgument() = default;  // nothing is to be settled
  SettleArgument(Queue& queue, const Between& between);
};

}  // namespace pytrain::ops
