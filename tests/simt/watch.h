// What the race and traffic checker (watch.cpp) is told by the shim, and what it tells. Other builds link none of it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

// What went between the parameters' memory and the launches since they were last asked for.
struct Traffic {
  int64_t read = 0, written = 0;  // bytes; those that the threads of a warp read together count once
  int64_t sectors = 0;            // of 32 bytes, that the warps' accesses touched
  int64_t accesses[5] = {};       // of 1, 2, 4, 8 and 16 bytes, by single threads
};

#ifdef SIMT_WATCH
constexpr bool watching = true;
void watch_launch();                                            // a launch begins
void watch_end();                                               // and ends
void watch_block(unsigned block, unsigned threads);             // a block begins; blocks run one after the other
void watch_thread(unsigned thread, const char* stack, size_t);  // this thread of the block runs from now on
void watch_barrier();                                           // all threads of the block have met
void watch_meeting(unsigned first, unsigned mask);              // the threads `mask` of the warp from `first` on have
void watch_fence();                                             // __threadfence() of the running thread
void watch_shared(const void* memory, size_t bytes);            // a shared array of the running block
void watch_memory(const void* memory, size_t bytes, bool counted);  // device memory; traffic is of what is counted
void forget_memory(const void* memory);
int64_t conflicts();  // so far
Traffic take_traffic();  // counts from the first call on
#else
constexpr bool watching = false;
inline void watch_launch() {}
inline void watch_end() {}
inline void watch_block(unsigned, unsigned) {}
inline void watch_thread(unsigned, const char*, size_t) {}
inline void watch_barrier() {}
inline void watch_meeting(unsigned, unsigned) {}
inline void watch_fence() {}
inline void watch_shared(const void*, size_t) {}
inline void watch_memory(const void*, size_t, bool) {}
inline void forget_memory(const void*) {}
inline int64_t conflicts() { return 0; }
inline Traffic take_traffic() { return {}; }
#endif

}  // namespace simt
