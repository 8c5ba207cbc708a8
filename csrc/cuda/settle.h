// What one thread does between the passes, in a launch of its own or at the end of pass 1: norms, clip coefficients,
// and where the loss scale is to move.
#pragma once

#include "cuda/backend.h"
#include "cuda/language.h"

namespace pytrain::cuda {

// What pass 2 is to make of the scaler's state: until then an error leaves that as it is.
static PT_OUTLINE void find_move(const Settle& job) {
  *job.moved = *job.scaler;
  core::update(*job.moved, job.policy, job.words.many ? job.words.many : job.words.here, job.n_controls);
}

// What it adds up has a few numbers a param group, and comes out as on the CPU.
static PT_OUTLINE void settle_by(const Settle& job) {
  const int64_t* const words = job.words.many ? job.words.many : job.words.here;
  const int64_t* const groups = words + 3 * job.n_controls;
  const double* const max_norms = reinterpret_cast<const double*>(groups + job.n_rows);
  core::settle({job.n_controls, job.n_groups, words, words + job.n_controls, words + 2 * job.n_controls, groups,
                max_norms, job.room},
               job.scale ? static_cast<double>(*job.scale) : 1.0);
}

}  // namespace pytrain::cuda
