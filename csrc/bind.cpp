// The small Python module: facts about the build and the rules, what python/ finds out about objects and tensors, and a
// short way to the kernels, which stand in a library without Python. It computes nothing.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "core/layout.h"
#include "cpu/isa.h"
#include "python/call.h"
#include "python/host.h"
#include "python/reader.h"
#include "python/watch.h"
#include "rules/all.h"

namespace py = pybind11;

namespace {

using pytrain::python::Reader;
using pytrain::python::Trail;
using pytrain::python::method;
namespace host = pytrain::python::host;

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
  m.def("collect", &pytrain::python::collect, py::arg("items"), py::arg("attribute"),
        "(values, positions) of an attribute over a list, leaving out None; empty positions mean every item.");
  m.attr("pair_words") = sizeof(pytrain::core::Pair) / sizeof(int64_t);
  m.attr("trail_words") = sizeof(Trail) / sizeof(int64_t);
  py::class_<Reader>(m, "Reader", "Reads where parameters and gradients lie, through DLPack's C exchange API.")
      .def(py::init<const py::object&, const py::tuple&, const py::object&, std::uintptr_t, std::uintptr_t>(),
           py::arg("exchange"), py::arg("types"), py::arg("probe"), py::arg("tensor"), py::arg("storage"))
      .def_property_readonly("leaves_trails", &Reader::leaves_trails)
      .def("gather", &Reader::gather_alone, py::arg("params"), py::arg("address"),
           "As collect(params, \"grad\"); also fills in a Pair for each parameter with a gradient at an address, and "
           "before it a trail for each.");
  static PyMethodDef calls[] = {
      method<host::connect>("connect", "Before the other calls: the address of the kernels' own, what notes writes."),
      method<host::begin>("begin", "Resets a control block: control, its rows, inv_scale, clip_value, ema_weight."),
      method<host::step>("step", "As the op _table_step_pairs: table, pairs, n, rows, control, its numbers, mode; and "
                                 "a list of what it writes."),
      method<host::gather>("gather", "Reader.gather, and `step` to fit or measure: reader, params, table, pairs, "
                                     "control, its numbers, mode."),
      method<host::settle>("settle", "As the op _control: [(control, rows)], scale, scaled, clip_groups, max_norms."),
      method<host::update_scaler>("update_scaler", "As the op _scaler_update: state, policy, controls."),
      method<pytrain::python::watch>("watch", "Remembers the objects in an optimizer's param_groups and state."),
      method<pytrain::python::check>("check", "Of a watch, param_groups and state: 0: all the same; 1: hyperparameters "
                                              "may have changed; 2: parameters or state are other objects."),
      {nullptr, nullptr, 0, nullptr}};
  if (PyModule_AddFunctions(m.ptr(), calls) != 0) throw py::error_already_set();
}
