// Tensors and lists of tensors as the LibTorch stable ABI hands them over.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <utility>

namespace pytrain::ops {

// Owns a reference to a tensor.
class Handle {
 public:
  Handle() = default;
  explicit Handle(AtenTensorHandle raw) : raw_(raw) {}
  Handle(Handle&& other) noexcept : raw_(std::exchange(other.raw_, nullptr)) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(raw_, other.raw_);
    return *this;
  }
  ~Handle() {
    if (raw_) aoti_torch_delete_tensor_object(raw_);
  }
  AtenTensorHandle get() const { return raw_; }
  // A torch::stable::Tensor takes its reference over.
  torch::stable::Tensor take() { return torch::stable::Tensor(std::exchange(raw_, nullptr)); }

 private:
  AtenTensorHandle raw_ = nullptr;
};

// Owns a list argument. The list comes with one handle an entry, already made; they are lent out and let go at the end.
class TensorList {
 public:
  explicit TensorList(StableIValue value) : raw_(torch::stable::detail::to<StableListHandle>(value)) {
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_size(raw_, &size_));
  }
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;
  ~TensorList() {
    for (int64_t i = 0; i < size(); ++i) aoti_torch_delete_tensor_object((*this)[i]);
    torch_delete_list(raw_);
  }

  int64_t size() const { return static_cast<int64_t>(size_); }
  AtenTensorHandle operator[](int64_t i) const {
    StableIValue item;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_get_item(raw_, static_cast<size_t>(i), &item));
    return torch::stable::detail::to<AtenTensorHandle>(item);
  }

 private:
  StableListHandle raw_;
  size_t size_ = 0;
};

// A second reference to a lent tensor.
inline Handle share(AtenTensorHandle lent) {
  AtenTensorHandle own;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(lent, &own));
  return Handle(own);
}

// What the checks and the loops need to know of a strided tensor on the CPU; borrowed from its handle.
struct View {
  void* data = nullptr;
  int64_t numel = 0, dim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int32_t dtype = -1;
  bool contiguous = false;
  bool usable = false;  // strided and on the CPU; nothing else is filled in where it is not
};

// Reads a tensor's facts. A parameter's or state's data is wanted writable: a copy-on-write tensor splits off then.
View view(AtenTensorHandle tensor, bool writable);

bool same_sizes(const View& a, const View& b);
// Equal strides wherever a dimension has more than one element.
bool same_strides(const View& a, const View& b);
// Its elements fill one block of memory without gaps, in any order of dimensions.
bool dense(const View& a);
// No two of its elements share memory. Says no to layouts so odd that this is not evident from the strides.
bool evidently_disjoint(const View& a);

}  // namespace pytrain::ops
