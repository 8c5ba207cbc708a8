// Steps on a device: which library of kernels runs there, and a table's memory over there.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/segment.h"
#include "cuda/backend.h"
#include "ops/tensor.h"

namespace pytrain::ops {

using core::cpu_device;

// The kernels for a device; null where the CPU's own loops serve. An error where there are none.
const cuda::Backend* backend_of(int64_t device);
// Whether something serves there: the CPU's own loops, or kernels that are loaded.
bool has_kernels(int64_t device);
// Whether steps on the CPU go through kernels that were written for a GPU: only in tests.
bool simulates();

// The numbers of a step that come from the host: a control block there, and whether the device has not begun its own.
struct Given {
  const double* numbers = nullptr;  // null: the device's control block has them
  int64_t n_rows = 0;
  bool fresh = false;
};

// Queues one launch, or several, on the device's stream.
class Queue {
 public:
  explicit Queue(int64_t device);
  int64_t device() const { return device_; }
  // Writes n words to the device, by value.
  void upload(const int64_t* words, int64_t n, void* to);
  // Device memory for so many words; the tensor owns it. Taken and let go on this stream.
  Handle room(int64_t n_words) const;
  static void* memory(const Handle& room);
  template <class Body>
  void run(Body body) {
    const auto call = [](void* stream, void* context) {
      auto& [queue, body, error] = *static_cast<Context<Body>*>(context);
      (void)queue;
      try {
        body(stream);
      } catch (const std::exception& e) {
        error = e.what();
      }
    };
    Context<Body> context{this, body, {}};
    backend_->on_device(device_, call, &context);
    STD_TORCH_CHECK(context.error.empty(), context.error);
  }
  const cuda::Backend& backend() const { return *backend_; }
  void check(const char* error, const char* what) const;

 private:
  template <class Body>
  struct Context {
    Queue* queue;
    Body& body;
    std::string error;
  };
  const int64_t device_;
  const cuda::Backend* const backend_;
};

// What a launch over many parameters reads, kept on the device and written again only where it has changed. What a
// captured graph reads is its own, and the graph writes it each time that it runs: steps before and after it write
// elsewhere, and nothing that only a graph will write counts as written.
class DeviceTable {
 public:
  // Fills in the job's tables. The items' `first_chunk` and `n_chunks` are found here.
  void load(Queue& queue, void* stream, std::vector<cuda::Item>& items, cuda::Job& job);
  // Whether a graph may still read what is here.
  bool captured() const { return !captured_.empty(); }

 private:
  struct Memory {
    Handle room;
    int64_t size = 0;              // in words
    void* stream = nullptr;        // that it was taken on
    uint64_t capture = 0;          // whose graph has it; 0: none
    int64_t cut = 0;               // which cut its chunks are
    std::vector<int64_t> words;    // items, chunks, large, ticket: as the stream leaves them; empty where unknown
  };
  void cut(const std::vector<cuda::Item>& items);
  Memory& memory_for(const Queue& queue, void* stream, int64_t size);
  void write(Queue& queue, Memory& memory, const std::vector<cuda::Item>& items, int64_t n_words) const;

  std::vector<int64_t> numels_;            // that the chunks were cut for
  std::vector<int64_t> chunks_, large_;
  int64_t cut_ = 0;                        // how often they were cut
  Memory eager_;
  std::vector<Memory> captured_;           // never given back: a graph may run as long as its parameters are there
};

// One step's launches, as Table::Mode says.
struct DeviceStep {
  int rule;
  bool measures;  // the rule takes sums
  bool serial;    // parameters share memory: one launch each
  core::Storage storage;
  core::Control* control;
  int64_t n_rows;
  Given given;
  const cuda::Settle* then;  // what pass 1 settles
  core::Scaler* scaler;      // what the last launch of an update moves; null: nothing
  const core::Scaler* moved;
  double* sums;              // where the rule's sums stand between two calls; null: one call takes them and updates
};
enum class Launches { stats, sums, update };
void run_on_device(Queue& queue, DeviceTable& table, std::vector<cuda::Item>& items, const DeviceStep& step,
                   Launches launches);

}  // namespace pytrain::ops
