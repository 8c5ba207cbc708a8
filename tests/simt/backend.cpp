// The shipped kernels on the CPU as one library, for csrc/ops to launch as it launches CUDA's. Launches of a capture
// are recorded with their arguments, and run when a test replays them, as those of a CUDA graph.
#include "cuda/backend.h"

#include <cstdlib>
#include <functional>
#include <map>
#include <vector>

#include "simt/shim.h"

namespace pytrain::cuda {
namespace {

void on_device(int64_t, void (*body)(void* stream, void* context), void* context) { body(nullptr, context); }

// Few, so that blocks take several chunks each.
int64_t multiprocessors(int64_t) { return 3; }

uint64_t capturing = 0;
std::map<uint64_t, std::vector<std::function<const char*()>>> graphs;

uint64_t capture(void*) { return capturing; }

const char* run(std::function<const char*()> launch) {
  if (!capturing) return launch();
  graphs[capturing].push_back(std::move(launch));
  return nullptr;
}

const char* step(Class kind, int rule, bool measure, const Job& job, int64_t width, void* stream) {
  return run([=] { return launch_step(kind, rule, measure, job, width, stream); });
}

template <class Any, const char* (*launch)(const Any&, int64_t, void*)>
const char* with_job(const Any& job, int64_t width, void* stream) {
  return run([=] { return launch(job, width, stream); });
}

const char* stats(const Job& job, const Settle& then, int64_t width, void* stream) {
  return run([=] { return launch_stats(job, then, width, stream); });
}

const char* upload(const Piece& piece, void* to, void* stream) {
  return run([=] { return launch_upload(piece, to, stream); });
}

template <class Small, const char* (*launch)(const Small&, void*)>
const char* with_small(const Small& job, void* stream) {
  return run([=] { return launch(job, stream); });
}

const Backend table{bytes_of_build,
                    on_device,
                    multiprocessors,
                    capture,
                    step,
                    stats,
                    with_job<Job, launch_average>,
                    with_job<Copies, launch_copy>,
                    upload,
                    with_small<Settle, launch_settle>,
                    with_small<ScalerUpdate, launch_scaler>};

}  // namespace
}  // namespace pytrain::cuda

#define EXPORT __attribute__((visibility("default")))
extern "C" {
EXPORT const void* pytrain_backend() { return &pytrain::cuda::table; }
EXPORT void pytrain_simt_order(int order, unsigned long long seed) {
  simt::set_order(static_cast<simt::Order>(order), seed);
}
EXPORT long long pytrain_simt_launches() { return simt::launches(); }
// Launches from now on belong to this capture; 0: they run.
EXPORT void pytrain_simt_capture(unsigned long long id) { pytrain::cuda::capturing = id; }
// Runs what a capture has recorded; returns how many launches that were.
EXPORT long long pytrain_simt_replay(unsigned long long id) {
  const auto& graph = pytrain::cuda::graphs[id];
  for (const auto& launch : graph) launch();
  return static_cast<long long>(graph.size());
}
EXPORT void pytrain_simt_fail(long long launch) { simt::fail_launch(launch); }
}
