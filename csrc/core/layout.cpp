// Answers questions about a tensor's strides; see layout.h.
#include "core/layout.h"

#include <algorithm>
#include <vector>

namespace pytrain::core {
namespace {

// The dimensions with more than one element, by rising stride.
std::vector<int64_t> by_stride(const View& a) {
  std::vector<int64_t> order;
  for (int64_t d = 0; d < a.dim; ++d) {
    if (a.sizes[d] != 1) order.push_back(d);
  }
  std::sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return a.strides[x] < a.strides[y]; });
  return order;
}

}  // namespace

bool same_sizes(const View& a, const View& b) {
  return a.dim == b.dim && std::equal(a.sizes, a.sizes + a.dim, b.sizes);
}

bool same_strides(const View& a, const View& b) {
  for (int64_t d = 0; d < a.dim; ++d) {
    if (a.sizes[d] != 1 && a.strides[d] != b.strides[d]) return false;
  }
  return true;
}

bool contiguous(const View& a) {
  int64_t expected = 1;
  for (int64_t d = a.dim - 1; d >= 0; --d) {
    if (a.sizes[d] == 1) continue;
    if (a.strides[d] != expected) return a.numel == 0;
    expected *= a.sizes[d];
  }
  return true;
}

bool dense(const View& a) {
  if (a.contiguous || a.numel == 0) return true;
  int64_t expected = 1;
  for (const int64_t d : by_stride(a)) {
    if (a.strides[d] != expected) return false;
    expected *= a.sizes[d];
  }
  return true;
}

bool evidently_disjoint(const View& a) {
  if (a.contiguous || a.numel == 0) return true;
  int64_t reach = 0;  // the largest offset that the dimensions so far can add up to
  for (const int64_t d : by_stride(a)) {
    if (a.strides[d] <= reach) return false;
    reach += a.strides[d] * (a.sizes[d] - 1);
  }
  return true;
}

}  // namespace pytrain::core
