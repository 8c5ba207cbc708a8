// The words of csrc/cuda/language.h for an ordinary compiler: the shipped kernels run on the CPU, each CUDA thread as a
// fiber of its own, barriers and warp shuffles as the meetings that they are. Wrong meetings end the program with the
// positions of all that are stuck. What a GPU does in parallel runs here in an order that simt::Order picks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define PT_KERNEL(threads) void
#define PT_ARGUMENT(type) const type&
#define PT_DEVICE inline
#define PT_SHARED(type, name, count) \
  type* const name = static_cast<type*>(::simt::shared(__COUNTER__, sizeof(type) * (count)))
#define PT_LAUNCH(kernel, blocks, threads, stream, ...) \
  (static_cast<void>(stream), ::simt::launch(blocks, threads, [&] { (kernel)(__VA_ARGS__); }))

namespace simt {

enum class Order : int { forward, reverse, seeded };

// How the blocks of a launch, and the threads of a block between two meetings, follow each other.
void set_order(Order order, uint64_t seed);
// How many launches there were, and a failure to answer launch number `launch` from now with (0: the next).
int64_t launches();
void fail_launch(int64_t launch);

void launch(unsigned blocks, unsigned threads, const std::function<void()>& thread);
const char* launch_error();

// Memory of the running block, the same for all its threads and full of nan until they write to it.
void* shared(int id, size_t bytes);
void meet_block(const char* file, int line);
void meet_warp(unsigned mask, const char* file, int line);
// Meets the warp's threads of `mask`, each with 8 bytes; returns those of the thread `lane`.
uint64_t exchange(unsigned mask, uint64_t mine, unsigned lane, const char* file, int line);
void fence();

struct Index {
  unsigned x, y, z;
};

template <class T>
T shuffle_xor(unsigned mask, T value, int apart, const char* file, int line);

}  // namespace simt

extern thread_local simt::Index threadIdx, blockIdx, blockDim, gridDim;

template <class T>
T simt::shuffle_xor(unsigned mask, T value, int apart, const char* file, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, (threadIdx.x % 32) ^ static_cast<unsigned>(apart), file, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

#define __syncthreads() ::simt::meet_block(__FILE__, __LINE__)
#define __syncwarp(mask) ::simt::meet_warp(mask, __FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, apart) ::simt::shuffle_xor(mask, value, apart, __FILE__, __LINE__)
#define __threadfence() ::simt::fence()

template <class T>
inline T atomicAdd(T* at, T value) {
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
template <class T>
inline T atomicMin(T* at, T value) {
  T before = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (value < before) {
    if (__atomic_compare_exchange_n(at, &before, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) break;
  }
  return before;
}

namespace pytrain::cuda {
using simt::launch_error;
}
