// The kernel library's calls for what lies in host memory, as functions for Python. Tensors come as addresses: the
// caller keeps alive what they point to.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <utility>
#include <vector>

#include "core/prefetch.h"
#include "ops/host.h"
#include "python/reader.h"

namespace pytrain::python::host {

using core::Control;
using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// What `connect` was told: where the calls are, and what notes that tensors are written.
struct Connection {
  const ops::HostCalls* calls = nullptr;
  PyObject* note_written = nullptr;  // never let go of: the interpreter may be gone before this library
};
inline Connection& connection() {
  static Connection only;
  return only;
}
inline const ops::HostCalls& calls() {
  if (!connection().calls) throw std::runtime_error("connect was not called");
  return *connection().calls;
}
inline void connect(Address calls, PyObject* note_written) {
  connection() = {at<const ops::HostCalls>(calls), Py_NewRef(note_written)};
}

// The control block of a step whose gradients were not looked at yet; the rows' hyperparameters stay.
inline void begin(Address control, int64_t rows, double inv_scale, double clip_value, double ema_weight) {
  Control& head = *at<Control>(control);
  head = {inv_scale, 0.0, clip_value, 0.0, -1.0};
  for (int64_t i = 0; i < rows; ++i) {
    head.rows()[i].ema_weight = ema_weight;
    head.rows()[i].clip_coef = 1.0;
    head.rows()[i].sumsq = 0.0;
  }
}

// Calls what a note of these tensors looks at into the caches; the first n are parameters.
inline void call_versions(PyObject* written, const Pair* pairs, int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    prefetch(PyList_GET_ITEM(written, k));
    core::prefetch_flat(pairs[k].param.sizes);
    prefetch(trail_of(pairs, k).version);
  }
}

// written: a list of what the step will write, to be noted while it does, parameters first; or None.
inline int64_t step(int64_t table, Address pairs, int64_t n, const std::vector<int64_t>& rows, Address control,
                    int64_t numbers, int64_t mode, PyObject* written) {
  struct Noting {
    PyObject* written;
    const Pair* pairs;
    int64_t n;
    std::exception_ptr error;
  } noting{written, at<const Pair>(pairs), n, nullptr};
  const auto note = [](void* context) {
    auto& it = *static_cast<Noting*>(context);
    const py::gil_scoped_acquire python;
    call_versions(it.written, it.pairs, it.n);
    PyObject* const nothing = PyObject_CallOneArg(connection().note_written, it.written);
    if (!nothing) it.error = std::make_exception_ptr(py::error_already_set());
    Py_XDECREF(nothing);
  };
  ops::Beside beside;
  if (written != Py_None) {
    if (!PyList_Check(written) || PyList_GET_SIZE(written) < n) throw py::type_error("written: expected a list");
    beside = {note, &noting};
  }
  const ops::HostCalls& kernels = calls();
  int64_t code;
  {
    const py::gil_scoped_release others_may_run;
    code = kernels.step(table, at<const Pair>(pairs), n, rows, at<Control>(control), numbers, mode, beside);
  }
  if (noting.error) std::rethrow_exception(noting.error);
  return code;
}

// The Reader in a Python object; that of the last call is remembered.
inline const Reader& reader_in(PyObject* object) {
  static PyObject* last = nullptr;
  static const Reader* reader = nullptr;
  if (object != last) {
    reader = py::handle(object).cast<const Reader*>();
    Py_XSETREF(last, Py_NewRef(object));
  }
  return *reader;
}

// `reader.gather` of the parameters, and what `step` returns for them; or -3 where a gradient is missing.
inline py::object gather(PyObject* reader, PyObject* params, int64_t table, Address pairs, Address control,
                         int64_t numbers, int64_t mode) {
  if (!PyList_Check(params)) throw py::type_error("params: expected a list");
  struct Reading {
    const Reader& reader;
    const py::list params;
    Pair* pairs;
    py::tuple found;
    std::exception_ptr error;
    PyThreadState* released = nullptr;
  } reading{reader_in(reader), py::reinterpret_borrow<py::list>(params), at<Pair>(pairs), py::tuple(), nullptr};
  const auto run = [](void* context, std::atomic<int64_t>& read) {
    auto& it = *static_cast<Reading*>(context);
    try {
      it.found = it.reader.gather(it.params, it.pairs, read);
    } catch (...) {
      it.error = std::current_exception();
      read = -1;
    }
    it.released = PyEval_SaveThread();  // others may run while the rest is done
  };
  const ops::HostCalls& kernels = calls();
  int64_t code;
  {
    struct Restore {
      PyThreadState*& released;
      ~Restore() {
        if (released) PyEval_RestoreThread(released);
      }
    } const restore{reading.released};
    code = kernels.gather(table, reading.pairs, PyList_GET_SIZE(params), {run, &reading}, at<Control>(control), numbers,
                          mode);
  }
  if (reading.error) std::rethrow_exception(reading.error);
  return py::make_tuple(reading.found[0], reading.found[1], code);
}

inline void settle(const std::vector<std::pair<Address, int64_t>>& controls, Address scale,
                   const std::vector<int64_t>& scaled, const std::vector<int64_t>& clip_groups,
                   const std::vector<double>& max_norms) {
  std::vector<std::pair<Control*, int64_t>> blocks;
  for (const auto& [address, rows] : controls) blocks.emplace_back(at<Control>(address), rows);
  calls().settle(blocks, *at<const float>(scale), scaled, clip_groups, max_norms);
}

inline bool update_scaler(Address state, const std::vector<double>& policy, const std::vector<int64_t>& controls) {
  if (policy.size() != core::policy_size) throw py::value_error("policy: expected all of its numbers");
  core::Policy rules;
  std::copy(policy.begin(), policy.end(), reinterpret_cast<double*>(&rules));
  return calls().update_scaler(at<core::Scaler>(state), rules, controls);
}

}  // namespace pytrain::python::host
