// Where the tensors of a step lie, read through DLPack's C exchange API. Call it with the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <ATen/dlpack.h>  // a header of plain C structs, from the DLPack standard

#include <atomic>
#include <cstdint>
#include <utility>

#include "core/layout.h"
#include "core/prefetch.h"

namespace pytrain::python {

namespace py = pybind11;
using core::Format;
using core::Pair;
using core::View;
using core::prefetch;

// The attribute of each item that has it (is not None), and the positions of those items; no positions mean all.
// Calls found(item, value, how many came before, its position) for each, and before that ahead(item, its position) some
// items early.
constexpr Py_ssize_t items_ahead = 16;
template <class Ahead, class Found>
py::tuple collect_each(const py::list& items, const py::str& attribute, Ahead&& ahead, Found&& found) {
  const Py_ssize_t n = PyList_GET_SIZE(items.ptr());
  py::list values(n), positions;
  Py_ssize_t kept = 0;
  for (Py_ssize_t i = 0; i < n; ++i) {
    if (i + items_ahead < n) ahead(PyList_GET_ITEM(items.ptr(), i + items_ahead), i + items_ahead);
    PyObject* const value = PyObject_GetAttr(PyList_GET_ITEM(items.ptr(), i), attribute.ptr());
    if (!value) throw py::error_already_set();
    if (value == Py_None) {
      Py_DECREF(value);
      if (kept == i) {  // the first one that is missing: from here on positions are needed
        for (Py_ssize_t k = 0; k < i; ++k) positions.append(k);
      }
      continue;
    }
    if (kept < i) positions.append(i);
    PyList_SET_ITEM(values.ptr(), kept, value);
    found(PyList_GET_ITEM(items.ptr(), i), value, kept++, i);
  }
  if (kept < n && PyList_SetSlice(values.ptr(), kept, n, nullptr) != 0) throw py::error_already_set();
  return py::make_tuple(std::move(values), std::move(positions));
}

inline py::tuple collect(const py::list& items, const py::str& attribute) {
  const auto nothing = [](PyObject*, Py_ssize_t) {};
  return collect_each(items, attribute, nothing, [](PyObject*, PyObject*, Py_ssize_t, Py_ssize_t) {});
}

// Where a step came to when it read a parameter and its gradient: the next one calls it into the caches early. Nothing
// here is ever followed, so it may be out of date.
struct Trail {
  const void *storage = nullptr, *autograd = nullptr, *version = nullptr, *grad = nullptr, *grad_storage = nullptr;

  void call() const {
    for (const void* at : {storage, autograd, grad, grad_storage}) prefetch(at);
    prefetch(static_cast<const char*>(autograd) + 40);  // it may be in two lines
  }
};
// They lie before the pairs, the last one first.
inline Trail& trail_of(const Pair* pairs, int64_t i) {
  return reinterpret_cast<Trail*>(const_cast<Pair*>(pairs))[-1 - i];
}

// Reads tensors' addresses, sizes and strides through the C exchange API of the DLPack standard (1.3), which costs a
// tenth of a list of tensors passed to an op. What it cannot read is marked unusable; the caller then passes lists.
class Reader {
 public:
  // exchange: torch.Tensor.__dlpack_c_exchange_api__; types: the exact types that it may read; probe: any tensor of
  // them with few dimensions, and where torch says that it and its storage are.
  Reader(const py::object& exchange, const py::tuple& types, const py::object& probe, std::uintptr_t tensor,
         std::uintptr_t storage)
      : exchange_(exchange), types_(types) {
    api_ = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
    if (!api_) throw py::error_already_set();
    if (api_->header.version.major != DLPACK_MAJOR_VERSION) throw py::import_error("another DLPack major version");
    const View v = read(probe.ptr());
    if (!is_short(v)) return;
    const auto head = static_cast<int64_t>(reinterpret_cast<std::uintptr_t>(v.sizes) - tensor) / word_bytes;
    const bool near = head > word_of_version && head <= most_head;
    if (near && reinterpret_cast<std::uintptr_t>(word(v, head, word_of_storage)) == storage) head_ = head;
  }

  // `collect` of the gradients; fills in a Pair a parameter that has one, at an address with room for all. Others may
  // take the pairs while more are read: `told` says how many there are, or -1 where a gradient is missing. Before
  // the address there is room for as many trails.
  py::tuple gather(const py::list& params, Pair* pairs, std::atomic<int64_t>& told) const {
    const auto n = PyList_GET_SIZE(params.ptr());
    const auto ahead = [&](PyObject* param, Py_ssize_t i) {
      prefetch(param);
      core::prefetch_around(pairs[i].param.sizes);  // where the last step found them: a hint
      core::prefetch_around(pairs[i].grad.sizes);
      trail_of(pairs, i).call();
    };
    Py_ssize_t found = 0;
    const auto take = [&](PyObject* param, PyObject* grad, Py_ssize_t k, Py_ssize_t i) {
      pairs[k] = {read(param), read(grad)};
      if (head_) trail_of(pairs, i) = trail(pairs[k], grad);
      found = k + 1;
      if (k < i) {
        told.store(-1, std::memory_order_release);
      } else if (found % tell_every == 0 || found == n) {
        told.store(found, std::memory_order_release);
      }
    };
    py::tuple all = collect_each(params, grad_, ahead, take);
    if (found < n) told.store(-1, std::memory_order_release);
    return all;
  }

  py::tuple gather_alone(const py::list& params, std::uintptr_t address) const {
    std::atomic<int64_t> told{0};
    return gather(params, reinterpret_cast<Pair*>(address), told);
  }

  // Whether this torch lays out a tensor as `trail` expects it.
  bool leaves_trails() const { return head_ > 0; }

 private:
  static constexpr Py_ssize_t tell_every = 8;

  // A tensor with few dimensions has its sizes in itself, some words behind what belongs to it.
  static constexpr int64_t word_of_storage = 2, word_of_autograd = 3, word_of_version = 5, most_head = 32;
  static constexpr int64_t word_bytes = sizeof(void*), most_dimensions = 5;
  static bool is_short(const View& v) { return v.usable && v.sizes && v.dim <= most_dimensions; }
  static const void* word(const View& v, int64_t head, int64_t which) {
    return reinterpret_cast<const void* const*>(v.sizes)[which - head];
  }

  Trail trail(const Pair& pair, const void* grad) const {
    const View &p = pair.param, &g = pair.grad;
    Trail t;
    t.grad = grad;
    if (is_short(p)) {
      t.storage = word(p, head_, word_of_storage);
      t.autograd = word(p, head_, word_of_autograd);
      t.version = word(p, head_, word_of_version);
    }
    if (is_short(g)) t.grad_storage = word(g, head_, word_of_storage);
    return t;
  }

  View read(PyObject* tensor) const {
    View v;
    bool known = false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(types_.ptr()); ++i) {
      known |= reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == PyTuple_GET_ITEM(types_.ptr(), i);
    }
    DLTensor d;
    if (!known) return v;
    if (api_->dltensor_from_py_object_no_sync(tensor, &d) != 0) {
      PyErr_Clear();
      return v;
    }
    const bool cpu = d.device.device_type == kDLCPU;
    if ((!cpu && d.device.device_type != kDLCUDA) || d.dtype.lanes != 1 || (d.ndim > 0 && !d.strides)) return v;
    if (d.dtype.code == kDLFloat) {
      v.format = d.dtype.bits == 32   ? Format::fp32
                 : d.dtype.bits == 64 ? Format::fp64
                 : d.dtype.bits == 16 ? Format::fp16
                                      : Format::none;
    } else if (d.dtype.code == kDLBfloat && d.dtype.bits == 16) {
      v.format = Format::bf16;
    }
    v.device = cpu ? core::cpu_device : d.device.device_id;
    v.data = static_cast<char*>(d.data) + d.byte_offset;
    v.dim = d.ndim;
    v.sizes = d.shape;
    v.strides = d.strides;
    v.numel = 1;
    for (int64_t i = 0; i < v.dim; ++i) v.numel *= v.sizes[i];
    v.contiguous = core::contiguous(v);
    // A lazily negated view is not told apart here. It comes from the imaginary part of a complex tensor and so has
    // strides of two, which go through the lists, unless it has but one element.
    v.usable = v.numel != 1 || !is_negated(tensor);
    return v;
  }

  static bool is_negated(PyObject* tensor) {
    return py::reinterpret_borrow<py::object>(tensor).attr("is_neg")().cast<bool>();
  }

  py::object exchange_;
  py::tuple types_;
  py::str grad_{"grad"};
  const DLPackExchangeAPI* api_;
  int64_t head_ = 0;  // how many words of a tensor are before its sizes, if they are where `trail` expects them
};

}  // namespace pytrain::python
