// The small Python module: facts about the build and the rules, and a cheap answer to "are these still the same
// objects?" and "where do these tensors lie?", and a short way to the kernels, which stand in a library without Python.
// It computes nothing.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <ATen/dlpack.h>  // a header of plain C structs, from the DLPack standard

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "core/layout.h"
#include "core/prefetch.h"
#include "cpu/isa.h"
#include "ops/host.h"
#include "rules/all.h"

namespace py = pybind11;

namespace {

using pytrain::core::Control;
using pytrain::core::Format;
using pytrain::core::Pair;
using pytrain::core::View;

// Hyperparameters that cannot change while the object stays the same.
bool immutable(PyObject* value) {
  if (PyFloat_CheckExact(value) || PyLong_CheckExact(value) || PyBool_Check(value) || value == Py_None ||
      PyUnicode_CheckExact(value)) {
    return true;
  }
  if (!PyTuple_CheckExact(value)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) {
    if (!immutable(PyTuple_GET_ITEM(value, i))) return false;
  }
  return true;
}

// Remembers which objects stand in an optimizer's param_groups and state. Comparing addresses is enough because it
// owns a reference to each object: none of them can have been freed and another one put in its place.
class Watch {
 public:
  static constexpr int same = 0, hypers_changed = 1, objects_changed = 2;

  Watch(const py::list& groups, const py::dict& state) {
    walk(groups.ptr(), state.ptr(), [this](PyObject* object, int kind) {
      objects_.push_back(py::reinterpret_borrow<py::object>(object));
      volatile_ |= kind == hypers_changed && !immutable(object);
      return true;
    });
  }

  int check(const py::list& groups, const py::dict& state) {
    size_t at = 0;
    int result = volatile_ ? hypers_changed : same;
    const bool complete = walk(groups.ptr(), state.ptr(), [&](PyObject* object, int kind) {
      if (at >= objects_.size()) return false;
      py::object& remembered = objects_[at++];
      if (remembered.ptr() == object) return true;
      if (kind != hypers_changed) return false;
      remembered = py::reinterpret_borrow<py::object>(object);
      volatile_ |= !immutable(object);
      result = hypers_changed;
      return true;
    });
    return complete && at == objects_.size() ? result : objects_changed;
  }

 private:
  static bool is(PyObject* key, const char* name) {
    return PyUnicode_CheckExact(key) && PyUnicode_CompareWithASCIIString(key, name) == 0;
  }

  // Calls see(object, kind) for every object in a fixed order until it returns false.
  template <class See>
  static bool walk(PyObject* groups, PyObject* state, See&& see) {
    for (Py_ssize_t g = 0; g < PyList_GET_SIZE(groups); ++g) {
      PyObject* const group = PyList_GET_ITEM(groups, g);
      if (!see(group, objects_changed)) return false;
      if (!PyDict_Check(group)) continue;
      PyObject *key, *value;
      for (Py_ssize_t at = 0; PyDict_Next(group, &at, &key, &value);) {
        if (is(key, "param_names")) continue;
        const bool params = is(key, "params");
        if (!see(value, params ? objects_changed : hypers_changed)) return false;
        if (!params) continue;
        if (!PyList_Check(value) && !PyTuple_Check(value)) return false;  // what cannot be looked into may have changed
        for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(value); ++i) {
          if (!see(PySequence_Fast_GET_ITEM(value, i), objects_changed)) return false;
        }
      }
    }
    PyObject *param, *states;
    for (Py_ssize_t at = 0; PyDict_Next(state, &at, &param, &states);) {
      if (!see(param, objects_changed) || !see(states, objects_changed)) return false;
      if (!PyDict_Check(states)) continue;
      PyObject *key, *value;
      for (Py_ssize_t inner = 0; PyDict_Next(states, &inner, &key, &value);) {
        if (!see(key, objects_changed) || !see(value, objects_changed)) return false;
      }
    }
    return true;
  }

  std::vector<py::object> objects_;
  bool volatile_ = false;
};

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

py::tuple collect(const py::list& items, const py::str& attribute) {
  const auto nothing = [](PyObject*, Py_ssize_t) {};
  return collect_each(items, attribute, nothing, [](PyObject*, PyObject*, Py_ssize_t, Py_ssize_t) {});
}

// Reads tensors' addresses, sizes and strides through the C exchange API of the DLPack standard (1.3), which costs a
// tenth of a list of tensors passed to an op. What it cannot read is marked unusable; the caller then passes lists.
class Reader {
 public:
  // exchange: torch.Tensor.__dlpack_c_exchange_api__; types: the exact types that it may read.
  Reader(const py::object& exchange, const py::tuple& types) : exchange_(exchange), types_(types) {
    api_ = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
    if (!api_) throw py::error_already_set();
    if (api_->header.version.major != DLPACK_MAJOR_VERSION) throw py::import_error("another DLPack major version");
  }

  // `collect` of the gradients; fills in a Pair a parameter that has one, at an address with room for all. Others may
  // take the pairs while more are read: `told` says how many there are, or -1 where a gradient is missing.
  py::tuple gather(const py::list& params, Pair* pairs, std::atomic<int64_t>& told) const {
    const auto n = PyList_GET_SIZE(params.ptr());
    const auto ahead = [&](PyObject* param, Py_ssize_t i) {
      pytrain::core::prefetch(param);
      pytrain::core::prefetch_around(pairs[i].param.sizes);  // where the last step found them: a hint
      pytrain::core::prefetch_around(pairs[i].grad.sizes);
    };
    Py_ssize_t found = 0;
    const auto take = [&](PyObject* param, PyObject* grad, Py_ssize_t k, Py_ssize_t i) {
      pairs[k] = {read(param), read(grad)};
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

 private:
  static constexpr Py_ssize_t tell_every = 8;

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
    v.device = cpu ? pytrain::core::cpu_device : d.device.device_id;
    v.data = static_cast<char*>(d.data) + d.byte_offset;
    v.dim = d.ndim;
    v.sizes = d.shape;
    v.strides = d.strides;
    v.numel = 1;
    for (int64_t i = 0; i < v.dim; ++i) v.numel *= v.sizes[i];
    v.contiguous = pytrain::core::contiguous(v);
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
};

// The kernel library's calls for what lies in host memory. The caller keeps alive what its addresses point to.
class Host {
 public:
  using Address = std::uintptr_t;

  Host(Address calls, py::object note_written)
      : calls_(*at<const pytrain::ops::HostCalls>(calls)), note_written_(std::move(note_written)) {}

  // The control block of a step whose gradients were not looked at yet; the rows' hyperparameters stay.
  void begin(Address control, int64_t rows, double inv_scale, double clip_value, double ema_weight) const {
    Control& head = *at<Control>(control);
    head = {inv_scale, 0.0, clip_value, 0.0, -1.0};
    for (int64_t i = 0; i < rows; ++i) {
      head.rows()[i].ema_weight = ema_weight;
      head.rows()[i].clip_coef = 1.0;
      head.rows()[i].sumsq = 0.0;
    }
  }

  // written: what the step will write, to be noted while it does; or None.
  int64_t step(int64_t table, Address pairs, int64_t n, const std::vector<int64_t>& rows, Address control,
               int64_t numbers, int64_t mode, const py::object& written) const {
    struct Noting {
      const py::object &note, &written;
      const Pair* pairs;
      int64_t n;
      std::exception_ptr error;
    } noting{note_written_, written, at<const Pair>(pairs), n, nullptr};
    const auto note = [](void* context) {
      auto& it = *static_cast<Noting*>(context);
      const py::gil_scoped_acquire python;
      call_versions(it.written, it.pairs, it.n);
      try {
        it.note(it.written);
      } catch (...) {
        it.error = std::current_exception();
      }
    };
    pytrain::ops::Beside beside;
    if (!written.is_none()) beside = {note, &noting};
    int64_t code;
    {
      const py::gil_scoped_release others_may_run;
      code = calls_.step(table, at<const Pair>(pairs), n, rows, at<Control>(control), numbers, mode, beside);
    }
    if (noting.error) std::rethrow_exception(noting.error);
    return code;
  }

  // `reader.gather` of the parameters, and what `step` returns for them; or -3 where a gradient is missing.
  py::tuple gather(const Reader& reader, const py::list& params, int64_t table, Address pairs, Address control,
                   int64_t numbers, int64_t mode) const {
    struct Reading {
      const Reader& reader;
      const py::list& params;
      Pair* pairs;
      py::tuple found;
      std::exception_ptr error;
      PyThreadState* released = nullptr;
    } reading{reader, params, at<Pair>(pairs), py::tuple(), nullptr};
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
    int64_t code;
    {
      struct Restore {
        PyThreadState*& released;
        ~Restore() {
          if (released) PyEval_RestoreThread(released);
        }
      } const restore{reading.released};
      code = calls_.gather(table, reading.pairs, PyList_GET_SIZE(params.ptr()), {run, &reading}, at<Control>(control),
                           numbers, mode);
    }
    if (reading.error) std::rethrow_exception(reading.error);
    return py::make_tuple(reading.found[0], reading.found[1], code);
  }

  void settle(const std::vector<std::pair<Address, int64_t>>& controls, Address scale,
              const std::vector<int64_t>& scaled, const std::vector<int64_t>& clip_groups,
              const std::vector<double>& max_norms) const {
    std::vector<std::pair<Control*, int64_t>> blocks;
    for (const auto& [address, rows] : controls) blocks.emplace_back(at<Control>(address), rows);
    calls_.settle(blocks, *at<const float>(scale), scaled, clip_groups, max_norms);
  }

  bool update_scaler(Address state, const std::array<double, pytrain::core::policy_size>& policy,
                     const std::vector<int64_t>& controls) const {
    pytrain::core::Policy rules;
    std::copy(policy.begin(), policy.end(), reinterpret_cast<double*>(&rules));
    return calls_.update_scaler(at<pytrain::core::Scaler>(state), rules, controls);
  }

 private:
  // Calls what a note of these tensors looks at into the caches; the first n are parameters, which the pairs know.
  static void call_versions(const py::object& written, const Pair* pairs, int64_t n) {
    for (int64_t k = 0; k < n; ++k) {
      pytrain::core::prefetch(PyList_GET_ITEM(written.ptr(), k));
      pytrain::core::prefetch_around(pairs[k].param.sizes);
    }
    for (int64_t k = 0; k < n; ++k) pytrain::core::prefetch_version(pairs[k].param.sizes, pairs[k].param.dim);
  }

  template <class T>
  static T* at(Address address) {
    return reinterpret_cast<T*>(address);
  }

  const pytrain::ops::HostCalls& calls_;
  py::object note_written_;
};

template <class Rule>
py::dict describe() {
  py::list states, scalars, hypers;
  for (int i = 0; i < pytrain::PT_ISA::rules::state_count<Rule>(); ++i) states.append(Rule::states[i]);
  for (int i = 0; i < pytrain::PT_ISA::rules::scalar_count<Rule>(); ++i) {
    scalars.append(pytrain::PT_ISA::rules::Scalars<Rule>::names[i]);
  }
  for (const char* name : Rule::hypers) hypers.append(name);
  py::dict facts;
  facts["states"] = py::tuple(states);
  facts["hypers"] = py::tuple(hypers);
  facts["scalars"] = py::tuple(scalars);
  facts["sums"] = pytrain::PT_ISA::rules::sum_count<Rule>();
  facts["counts"] = Rule::counts;
  return facts;
}

template <class... Rules>
py::dict describe_all(pytrain::PT_ISA::rules::List<Rules...>) {
  py::dict all;
  ((all[Rules::name] = describe<Rules>()), ...);
  return all;
}

py::dict isa_levels() {
  py::dict levels;
  for (int i = 0; i < pytrain::cpu::isa_count; ++i) {
    const auto isa = static_cast<pytrain::cpu::Isa>(i);
    levels[pytrain::cpu::isa_name(isa)] = pytrain::cpu::isa_supported(isa);
  }
  return levels;
}

}  // namespace


PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about the build and the rules, and a watch over Python objects.";
  m.attr("compiler") =
#ifdef __clang__
      "clang " __clang_version__;
#else
      "gcc " __VERSION__;
#endif
  m.def("rules", [] { return describe_all(pytrain::PT_ISA::rules::All{}); },
        "Every rule with its states, scalars and hyperparameters, how many sums it takes and whether it counts steps.");
  m.def("isa_levels", &isa_levels, "Every instruction set level and whether this machine supports it.");
  m.def("collect", &collect, py::arg("items"), py::arg("attribute"),
        "(values, positions) of an attribute over a list, leaving out None; empty positions mean every item.");
  m.attr("pair_words") = sizeof(pytrain::core::Pair) / sizeof(int64_t);
  py::class_<Reader>(m, "Reader", "Reads where parameters and gradients lie, through DLPack's C exchange API.")
      .def(py::init<const py::object&, const py::tuple&>(), py::arg("exchange"), py::arg("types"))
      .def("gather", &Reader::gather_alone, py::arg("params"), py::arg("address"),
           "As collect(params, \"grad\"); also fills in a Pair for each parameter with a gradient at an address.");
  py::class_<Host>(m, "Host", "The kernel library's calls for what lies in host memory, past torch's dispatcher.")
      .def(py::init<Host::Address, py::object>(), py::arg("calls"), py::arg("note_written"))
      .def("begin", &Host::begin, "Resets a control block: control, its rows, inv_scale, clip_value, ema_weight.")
      .def("step", &Host::step,
           "As the op _table_step_pairs: table, pairs, n, rows, control, its numbers, mode, what it writes.")
      .def("gather", &Host::gather,
           "Reader.gather, and `step` to fit or measure: reader, params, table, pairs, control, its numbers, mode.")
      .def("settle", &Host::settle, "As the op _control: [(control, rows)], scale, scaled, clip_groups, max_norms.")
      .def("update_scaler", &Host::update_scaler, "As the op _scaler_update: state, policy, controls.");
  py::class_<Watch>(m, "Watch", "Remembers the objects in an optimizer's param_groups and state.")
      .def(py::init<const py::list&, const py::dict&>(), py::arg("groups"), py::arg("state"))
      .def("check", &Watch::check, py::arg("groups"), py::arg("state"),
           "0: all the same; 1: hyperparameters may have changed; 2: parameters or state are other objects.");
}
