// A cheap answer to "are these still the same objects?". Holds references to Python objects; call it with the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "core/prefetch.h"

namespace pytrain::python {

namespace py = pybind11;

// Hyperparameters that cannot change while the object stays the same.
inline bool immutable(PyObject* value) {
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

// Whether dicts are as they were, without looking into them. CPython counts what happens to them: up to 3.11 each dict
// has the number of its last change, from 3.12 on who asked to is told of changes.
class Unchanged {
 public:
#if PY_VERSION_HEX < 0x030C0000
  void note(PyObject* dict) { noted_.emplace_back(dict, version(dict)); }
  bool holds() const {
    for (size_t i = 0; i < noted_.size(); ++i) {
      if (i + dicts_ahead < noted_.size()) core::prefetch(noted_[i + dicts_ahead].first);
      if (version(noted_[i].first) != noted_[i].second) return false;
    }
    return true;
  }
  void begin() { noted_.clear(); }

 private:
  static constexpr size_t dicts_ahead = 16;
  static uint64_t version(PyObject* dict) { return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag; }

  std::vector<std::pair<PyObject*, uint64_t>> noted_;
#elif !defined(Py_GIL_DISABLED)
  // Of an object's attributes 3.13 does not tell, as long as they lie in the object.
  void note(PyObject* dict) {
    watched_ = watched_ && !reinterpret_cast<PyDictObject*>(dict)->ma_values && PyDict_Watch(watcher(), dict) == 0;
    if (PyErr_Occurred()) PyErr_Clear();
  }
  bool holds() const { return watched_ && changes() == seen_; }
  void begin() {
    watched_ = watcher() >= 0;
    seen_ = changes();
  }

 private:
  static uint64_t& changes() {
    static uint64_t of_any = 0;
    return of_any;
  }
  static int count(PyDict_WatchEvent, PyObject*, PyObject*, PyObject*) {
    ++changes();
    return 0;
  }
  // -1 where others have taken all that there are.
  static int watcher() {
    static const int id = [] {
      const int given = PyDict_AddWatcher(&count);
      if (given < 0) PyErr_Clear();
      return given;
    }();
    return id;
  }

  bool watched_ = false;
  uint64_t seen_ = 0;
#else
  void note(PyObject*) {}
  bool holds() const { return false; }
  void begin() {}
#endif
};

// Remembers which objects stand in an optimizer's param_groups and state. Comparing addresses is enough because it
// owns a reference to each object: none of them can have been freed and another one put in its place.
class Watch {
 public:
  static constexpr int same = 0, hypers_changed = 1, objects_changed = 2;

  Watch(PyObject* groups, PyObject* state) {
    const auto remember = [this](PyObject* object, int kind) {
      objects_.push_back(py::reinterpret_borrow<py::object>(object));
      volatile_ |= kind == hypers_changed && !immutable(object);
      return true;
    };
    walk_groups(groups, remember);
    in_groups_ = objects_.size();
    walk_state(state, remember);
    note(state);
  }

  // Says `objects_changed` from the first time on.
  int check(PyObject* groups, PyObject* state) {
    const int result = lost_ ? objects_changed : look(groups, state);
    lost_ = result == objects_changed;
    return result;
  }

 private:
  int look(PyObject* groups, PyObject* state) {
    size_t at = 0, end = in_groups_;
    int result = volatile_ ? hypers_changed : same;
    const auto compare = [&](PyObject* object, int kind) {
      if (at == end) return false;
      py::object& remembered = objects_[at++];
      if (remembered.ptr() == object) return true;
      if (kind != hypers_changed) return false;
      remembered = py::reinterpret_borrow<py::object>(object);
      volatile_ |= !immutable(object);
      result = hypers_changed;
      return true;
    };
    if (!walk_groups(groups, compare) || at != end) return objects_changed;
    if (state == outer_ && states_.holds()) return result;  // the same objects are in it, whatever was done to them
    end = objects_.size();
    if (!walk_state(state, compare) || at != end) return objects_changed;
    note(state);
    return result;
  }

  static bool is(PyObject* key, const char* name) {
    return PyUnicode_CheckExact(key) && PyUnicode_CompareWithASCIIString(key, name) == 0;
  }

  // Both call see(object, kind) for every object in a fixed order until it returns false.
  template <class See>
  static bool walk_groups(PyObject* groups, See&& see) {
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
    return true;
  }

  template <class See>
  static bool walk_state(PyObject* state, See&& see) {
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

  void note(PyObject* state) {
    outer_ = state;
    states_.begin();
    states_.note(state);
    PyObject *param, *states;
    for (Py_ssize_t at = 0; PyDict_Next(state, &at, &param, &states);) {
      if (PyDict_Check(states)) states_.note(states);
    }
  }

  // `objects_` owns references to all dicts but the outer one, through which a cycle could lead back here. That one is
  // only looked into when it comes as an argument; another one in its place has another number, or was told of.
  Unchanged states_;
  PyObject* outer_ = nullptr;
  bool lost_ = false;
  std::vector<py::object> objects_;  // first those in the groups
  size_t in_groups_ = 0;
  bool volatile_ = false;
};

inline void check_watched(PyObject* groups, PyObject* state) {
  if (!PyList_Check(groups)) throw py::type_error("groups: expected a list");
  if (!PyDict_Check(state)) throw py::type_error("state: expected a dict");
}

// A capsule with a Watch, and what that says.
inline py::object watch(PyObject* groups, PyObject* state) {
  check_watched(groups, state);
  return py::capsule(new Watch(groups, state), "Watch", [](void* held) { delete static_cast<Watch*>(held); });
}
inline int64_t check(PyObject* watch, PyObject* groups, PyObject* state) {
  check_watched(groups, state);
  auto* const held = static_cast<Watch*>(PyCapsule_GetPointer(watch, "Watch"));
  if (!held) throw py::error_already_set();
  return held->check(groups, state);
}

}  // namespace pytrain::python
