// The few words that CUDA adds to C++. The only place that knows whether nvcc compiles the kernels for a GPU or an
// ordinary compiler compiles them for tests/simt, which runs the same source on the CPU.
#pragma once

#define PT_ISA cuda_device

#ifdef __CUDACC__
#include <cuda_runtime.h>

#define PT_KERNEL(threads) __global__ void __launch_bounds__(threads)
#define PT_RESIDENT_KERNEL(threads, blocks) /* with registers few enough for so many blocks a multiprocessor */ \
  __global__ void __launch_bounds__(threads, (blocks) * (threads) < most_threads ? (blocks) : most_threads / (threads))
#define PT_ARGUMENT(type) const __grid_constant__ type  // of a kernel: stays where the launch has put it
#define PT_DEVICE __device__ __forceinline__
#define PT_OUTLINE __device__ __noinline__  // for code of some size that every kernel would repeat
#define PT_SHARED(type, name, count) __shared__ type name[count]
#define PT_LAUNCH(kernel, blocks, threads, stream, ...) \
  kernel<<<dim3(blocks), dim3(threads), 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

namespace pytrain::cuda {
// What a multiprocessor holds; where that is not known, the smallest of the newer ones.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 750
constexpr int most_threads = 1024;
#elif defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000)
constexpr int most_threads = 2048;
#else
constexpr int most_threads = 1536;
#endif

// The same pointer, which the compiler may take to point to global memory; else it asks at each access.
template <class T>
PT_DEVICE T* global(T* at) {
  __builtin_assume(__isGlobal(at));
  return at;
}

// How many blocks of a kernel a multiprocessor holds at a time.
template <class Kernel>
int64_t resident_blocks(Kernel* kernel, int threads) {
  int blocks = 0;
  const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0);
  if (error != cudaSuccess) (void)cudaGetLastError();  // the launch will say it
  return error == cudaSuccess && blocks > 0 ? blocks : 1;
}

// Why the last launch failed; nothing if it did not.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
}  // namespace pytrain::cuda
#else
#include "simt/shim.h"

#define PT_RESIDENT_KERNEL(threads, blocks) PT_KERNEL(threads)
#define PT_OUTLINE inline

namespace pytrain::cuda {
template <class T>
PT_DEVICE T* global(T* at) {
  return at;
}
template <class Kernel>
int64_t resident_blocks(Kernel*, int) {
  return 1;
}
}  // namespace pytrain::cuda
#endif
