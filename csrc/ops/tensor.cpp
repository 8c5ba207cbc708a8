// Reads a tensor's facts through the C shims.
#include "ops/tensor.h"

namespace pytrain::ops {
namespace {

Format format_of(int32_t dtype) {
  struct Entry {
    int32_t dtype;
    Format format;
  };
  static const Entry entries[] = {
      {aoti_torch_dtype_float32(), Format::fp32},  {aoti_torch_dtype_float64(), Format::fp64},
      {aoti_torch_dtype_bfloat16(), Format::bf16}, {aoti_torch_dtype_float16(), Format::fp16},
      {aoti_torch_dtype_uint8(), Format::u8},      {aoti_torch_dtype_int16(), Format::i16},
  };
  for (const Entry& entry : entries) {
    if (dtype == entry.dtype) return entry.format;
  }
  return Format::none;
}

// cpu_device or a CUDA device's number; -2 for other kinds.
int64_t device_of(AtenTensorHandle tensor) {
  static const int32_t cpu = aoti_torch_device_type_cpu(), cuda = aoti_torch_device_type_cuda();
  int32_t type, index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &type));
  if (type == cpu) return core::cpu_device;
  if (type != cuda) return -2;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor, &index));
  return index;
}

}  // namespace

View view(AtenTensorHandle tensor, bool writable) {
  static const int32_t strided = aoti_torch_layout_strided();
  View v;
  int32_t dtype, layout;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor, &layout));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
  if (layout != strided) return v;
  v.device = device_of(tensor);
  if (v.device < core::cpu_device) return v;
  int64_t* sizes;
  int64_t* strides;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(tensor, &v.numel));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &v.dim));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(tensor, &v.contiguous));
  v.format = format_of(dtype);
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

Flat read_flat(AtenTensorHandle state) {
  Flat f;
  int32_t dtype;
  f.device = device_of(state);
  if (f.device < core::cpu_device) return f;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(state, &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(state, &f.numel));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(state, &f.contiguous));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(state, &f.data));
  f.format = format_of(dtype);
  return f;
}

}  // namespace pytrain::ops
