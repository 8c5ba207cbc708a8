// Functions for Python past pybind11's dispatcher, which takes some 10 us each time its code is not in the caches. They
// take positional arguments only; what they throw is raised.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <exception>
#include <type_traits>
#include <utility>
#include <vector>

namespace pytrain::python {

namespace py = pybind11;

// A C++ value of a Python object, which must live on; throws py::error_already_set where it is of another kind.
template <class T>
struct Taken;

template <class T>
T checked(T value) {
  if (value == static_cast<T>(-1) && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

template <>
struct Taken<int64_t> {
  static int64_t of(PyObject* object) { return checked<int64_t>(PyLong_AsLongLong(object)); }
};

template <>
struct Taken<std::uintptr_t> {
  static std::uintptr_t of(PyObject* object) { return checked<std::uintptr_t>(PyLong_AsSize_t(object)); }
};

template <>
struct Taken<double> {
  static double of(PyObject* object) { return checked(PyFloat_AsDouble(object)); }
};

template <>
struct Taken<PyObject*> {
  static PyObject* of(PyObject* object) { return object; }
};

template <class A, class B>
struct Taken<std::pair<A, B>> {
  static std::pair<A, B> of(PyObject* object) {
    if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != 2) throw py::type_error("expected a tuple of two");
    return {Taken<A>::of(PyTuple_GET_ITEM(object, 0)), Taken<B>::of(PyTuple_GET_ITEM(object, 1))};
  }
};

template <class T>
struct Taken<std::vector<T>> {
  static std::vector<T> of(PyObject* object) {
    if (!PyList_Check(object) && !PyTuple_Check(object)) throw py::type_error("expected a list or a tuple");
    std::vector<T> all(PySequence_Fast_GET_SIZE(object));
    for (size_t i = 0; i < all.size(); ++i) all[i] = Taken<T>::of(PySequence_Fast_GET_ITEM(object, i));
    return all;
  }
};

inline PyObject* given(int64_t value) { return PyLong_FromLongLong(value); }
inline PyObject* given(bool value) { return PyBool_FromLong(value); }
inline PyObject* given(py::object value) { return value.release().ptr(); }

template <class R, class... Args, size_t... I>
PyObject* call(R (*function)(Args...), PyObject* const* args, std::index_sequence<I...>) {
  if constexpr (std::is_void_v<R>) {
    function(Taken<std::decay_t<Args>>::of(args[I])...);
    Py_RETURN_NONE;
  } else {
    return given(function(Taken<std::decay_t<Args>>::of(args[I])...));
  }
}

template <class R, class... Args>
PyObject* call(R (*function)(Args...), PyObject* const* args, Py_ssize_t n) {
  if (n != sizeof...(Args)) {
    return PyErr_Format(PyExc_TypeError, "expected %zu arguments, got %zd", sizeof...(Args), n);
  }
  try {
    return call(function, args, std::index_sequence_for<Args...>{});
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// An entry of a module's table of functions.
template <auto function>
PyMethodDef method(const char* name, const char* doc) {
  constexpr auto called = [](PyObject*, PyObject* const* args, Py_ssize_t n) { return call(function, args, n); };
  PyObject* (*const plain)(PyObject*, PyObject* const*, Py_ssize_t) = called;
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(plain)), METH_FASTCALL, doc};
}

}  // namespace pytrain::python
