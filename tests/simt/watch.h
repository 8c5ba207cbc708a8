// What the race and traffic checker (watch.cpp) is told by the shim. Other builds link nothing of it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

#ifdef SIMT_WATCH
void watch_launch();                                            // a launch begins
void watch_end();                                               // and ends
void watch_block(unsigned block, unsigned threads);             // a block begins; blocks run one after the other
void watch_thread(unsigned thread, const char* stack, size_t);  // this thread of the block runs from now on
void watch_barrier();                                           // all threads of the block have met
void watch_meeting(unsigned first, unsigned mask);              // the threads `mask` of the warp from `first` on have
void watch_fence();                                             // __threadfence() of the running thread
void watch_shared(const void* memory, size_t bytes);            // a shared array of the running block
#else
inline void watch_launch() {}
inline void watch_end() {}
inline void watch_block(unsigned, unsigned) {}
inline void watch_thread(unsigned, const char*, size_t) {}
inline void watch_barrier() {}
inline void watch_meeting(unsigned, unsigned) {}
inline void watch_fence() {}
inline void watch_shared(const void*, size_t) {}
#endif

}  // namespace simt
