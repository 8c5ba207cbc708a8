// The small launches between pass 1 and pass 2 and after them: clip coefficients, the loss scale, and what the host
// writes to the device.
#include "cuda/backend.h"
#include "cuda/settle.h"

namespace pytrain::cuda {
namespace {

constexpr int copying = 128;  // threads of an upload

PT_KERNEL(copying) upload(PT_ARGUMENT(Piece) piece, int64_t* to) {
  for (int64_t i = threadIdx.x; i < piece.n; i += copying) to[i] = piece.words[i];
}

PT_KERNEL(1) settle(PT_ARGUMENT(Settle) job) { settle_by(job); }

PT_KERNEL(1) update_scaler(PT_ARGUMENT(ScalerUpdate) job) {
  core::update(*job.state, job.policy, job.words.many ? job.words.many : job.words.here, job.n_controls);
}

}  // namespace

const char* launch_upload(const Piece& piece, void* to, void* stream) {
  PT_LAUNCH(upload, 1, copying, stream, piece, static_cast<int64_t*>(to));
  return launch_error();
}

const char* launch_settle(const Settle& job, void* stream) {
  PT_LAUNCH(settle, 1, 1, stream, job);
  return launch_error();
}

const char* launch_scaler(const ScalerUpdate& job, void* stream) {
  PT_LAUNCH(update_scaler, 1, 1, stream, job);
  return launch_error();
}

}  // namespace pytrain::cuda
