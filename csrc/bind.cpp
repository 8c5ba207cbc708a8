// The small Python module: facts about the build and the rules, what python/ finds out about objects and tensors, and a
// short way to the kernels, which stand in a library without Python. It computes nothing.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "core/prefetch.h"
#include "cpu/isa.h"
#include "ops/host.h"
#include "python/reader.h"
#include "python/watch.h"
#include "rules/all.h"

namespace py = pybind11;

namespace {

using pytrain::core::Control;
using pytrain::core::Pair;
using pytrain::core::prefetch;
using pytrain::python::Reader;
using pytrain::python::Trail;
using pytrain::python::Watch;
using pytrain::python::trail_of;

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
  // Calls what a note of these tensors looks at into the caches; the first n are parameters.
  static void call_versions(const py::object& written, const Pair* pairs, int64_t n) {
    for (int64_t k = 0; k < n; ++k) {
      prefetch(PyList_GET_ITEM(written.ptr(), k));
      pytrain::core::prefetch_flat(pairs[k].param.sizes);
      prefetch(trail_of(pairs, k).version);
    }
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
