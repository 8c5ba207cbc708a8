// Reads a tensor's layout through the C shims and answers questions about it.
#include "ops/tensor.h"

#include <algorithm>
#include <vector>

namespace pytrain::ops {
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

View view(AtenTensorHandle tensor, bool writable) {
  static const int32_t cpu = aoti_torch_device_type_cpu();
  static const int32_t strided = aoti_torch_layout_strided();
  View v;
  int32_t device, layout;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor, &layout));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &v.dtype));
  if (layout != strided || device != cpu) return v;
  int64_t* sizes;
  int64_t* strides;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(tensor, &v.numel));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &v.dim));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(tensor, &v.contiguous));
  v.sizes = sizes;
  v.strides = strides;
  if (writable) {
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(tensor, &v.data));
  } else {
    const void* data;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor, &data));
    v.data = const_cast<void*>(data);  // Segment::grad is const again
  }
  v.usable = true;
  return v;
}

bool same_sizes(const View& a, const View& b) {
  return a.dim == b.dim && std::equal(a.sizes, a.sizes + a.dim, b.sizes);
}

bool same_strides(const View& a, const View& b) {
  for (int64_t d = 0; d < a.dim; ++d) {
    if (a.sizes[d] != 1 && a.strides[d] != b.strides[d]) return false;
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

}  // namespace pytrain::ops
