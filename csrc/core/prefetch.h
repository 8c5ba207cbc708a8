// Calls memory into the caches. Only a hint: any address will do, and no result changes.
#pragma once

#include <cstdint>

namespace pytrain::core {

// The empty assembly keeps GCC from taking functions that do nothing else for functions that do nothing, and dropping
// every call of them.
inline void prefetch(const void* at) {
  __builtin_prefetch(at);
  asm volatile("" : : "r"(at));
}

// A tensor's facts: torch keeps them around its sizes.
inline void prefetch_around(const void* sizes) {
  const char* const at = static_cast<const char*>(sizes);
  prefetch(at - 56);
  prefetch(at);
  prefetch(at + 88);
  prefetch(at + 112);
}

// The same without the sizes, for who asks only how many elements there are, and where.
inline void prefetch_flat(const void* sizes) {
  const char* const at = static_cast<const char*>(sizes);
  prefetch(at - 48);
  prefetch(at + 88);
  prefetch(at + 112);
}

}  // namespace pytrain::core
