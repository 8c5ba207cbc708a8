// The CUDA kernels as one library, for csrc/ops to launch. Of torch it takes only the stable ABI's C functions: the
// current stream, and a guard of the current device.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <atomic>
#include <string>

#include "cuda/backend.h"

namespace pytrain::cuda {
namespace {

namespace accelerator = torch::stable::accelerator;

std::string version(int number) {
  return number ? std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10) : "none";
}

// Throws what the caller's own checks throw, std::runtime_error: no frame of C or CUDA lies between here and there.
int attribute(cudaDeviceAttr name, int64_t device) {
  int value = 0, driver = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, name, static_cast<int>(device));
  if (error == cudaSuccess) return value;
  (void)cudaDriverGetVersion(&driver);
  (void)cudaGetLastError();  // it is told here, and not once more after the next launch
  STD_TORCH_CHECK(false, "pytrain's kernels cannot use device cuda:", device, ": ", cudaGetErrorString(error),
                  " (kernels: CUDA ", version(CUDART_VERSION), "; driver: ", version(driver), ")");
}

// Asked once a device.
int64_t multiprocessors(int64_t device) {
  static std::array<std::atomic<int64_t>, 128> known{};  // more devices than torch counts
  const auto index = static_cast<size_t>(device);
  std::atomic<int64_t>* const kept = index < known.size() ? &known[index] : nullptr;
  if (const int64_t count = kept ? kept->load(std::memory_order_relaxed) : 0) return count;
  const int64_t count = attribute(cudaDevAttrMultiProcessorCount, device);
  if (kept) kept->store(count, std::memory_order_relaxed);
  return count;
}

void on_device(int64_t device, void (*body)(void* stream, void* context), void* context) {
  multiprocessors(device);  // says why, where there is no such device; torch's guard would say it in its own terms
  const auto index = static_cast<accelerator::DeviceIndex>(device);
  const accelerator::DeviceGuard guard(index);
  body(accelerator::getCurrentStream(index).nativeHandle(), context);
}

// A stream that cannot answer captures nothing; where it cannot be used at all, the launch says so.
uint64_t capture(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  const cudaError_t error = cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id);
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error == cudaSuccess && status != cudaStreamCaptureStatusNone ? id : 0;
}

const Backend table{bytes_of_build, on_device,      multiprocessors, capture,       launch_step,
                    launch_stats,   launch_average, launch_copy,     launch_upload, launch_settle, launch_scaler};

}  // namespace
}  // namespace pytrain::cuda

#define EXPORT __attribute__((visibility("default")))
extern "C" {
EXPORT const void* pytrain_backend() { return &pytrain::cuda::table; }
// As 1000 * major + 10 * minor.
EXPORT int pytrain_cuda_version() { return CUDART_VERSION; }
// As in TORCH_CUDA_ARCH_LIST.
EXPORT const char* pytrain_cuda_architectures() { return PYTRAIN_CUDA_ARCHITECTURES; }
}
