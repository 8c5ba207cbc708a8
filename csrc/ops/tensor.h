// Tensors and lists of tensors as the LibTorch stable ABI hands them over.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <utility>

#include "core/layout.h"

namespace pytrain::ops {

using core::Format;
using core::View;

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

// Reads a tensor's facts. A parameter's or state's data is wanted writable: a copy-on-write tensor splits off then.
View view(AtenTensorHandle tensor, bool writable);

// The few facts that are enough for a state, which is nearly always contiguous. Read for every state in every step.
struct Flat {
  void* data = nullptr;
  int64_t numel = 0;
  int64_t device = core::cpu_device;
  Format format = Format::none;  // none also where it is on no device that has kernels
  bool contiguous = false;
};
Flat read_flat(AtenTensorHandle state);

}  // namespace pytrain::ops
