// The shipped kernels on the CPU as one library, for csrc/ops to launch as it launches CUDA's.
#include "cuda/backend.h"

#include <cstdlib>

#include "simt/shim.h"

namespace pytrain::cuda {
namespace {

void on_device(int64_t, void (*body)(void* stream, void* context), void* context) { body(nullptr, context); }

// Few, so that blocks take several chunks each.
int64_t multiprocessors(int64_t) { return 3; }

const Backend table{sizeof(Job),    on_device,     multiprocessors, launch_step, launch_stats,
                    launch_average, launch_upload, launch_settle,   launch_scaler};

}  // namespace
}  // namespace pytrain::cuda

#define EXPORT __attribute__((visibility("default")))
extern "C" {
EXPORT const void* pytrain_backend() { return &pytrain::cuda::table; }
EXPORT void pytrain_simt_order(int order, unsigned long long seed) {
  simt::set_order(static_cast<simt::Order>(order), seed);
}
EXPORT long long pytrain_simt_launches() { return simt::launches(); }
EXPORT void pytrain_simt_fail(long long launch) { simt::fail_launch(launch); }
}
