// What the checks need to know of a tensor's place in memory, and the questions they ask about it. Knows no torch.
#pragma once

#include <cstdint>

#include "core/segment.h"

namespace pytrain::core {

constexpr int64_t cpu_device = -1;  // others are the numbers of CUDA devices

// Borrowed: sizes and strides belong to the tensor.
struct View {
  void* data = nullptr;
  int64_t numel = 0, dim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  Format format = Format::none;
  int64_t device = cpu_device;
  bool contiguous = false;
  bool usable = false;  // strided, on the CPU or a CUDA device; nothing else is filled in where it is not
};

// A parameter and its gradient as a step meets them.
struct Pair {
  View param, grad;
};

bool same_sizes(const View& a, const View& b);
// Equal strides wherever a dimension has more than one element.
bool same_strides(const View& a, const View& b);
// Row-major without gaps; dimensions of one element may have any stride.
bool contiguous(const View& a);
// Its elements fill one block of memory without gaps, in any order of dimensions.
bool dense(const View& a);
// No two of its elements share memory. Says no to layouts so odd that this is not evident from the strides.
bool evidently_disjoint(const View& a);

}  // namespace pytrain::core
