// Queues launches; nothing here waits for a device.
#include "ops/device.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace pytrain::ops {
namespace {

using cuda::Item;
using cuda::Job;

std::atomic<const cuda::Backend*> cuda_backend{nullptr}, simt_backend{nullptr};

constexpr int64_t words_of(int64_t bytes) { return (bytes + 7) / 8; }
constexpr int64_t item_words = sizeof(Item) / 8, chunk_words = sizeof(cuda::Chunk) / 8;
static_assert(sizeof(Item) % 8 == 0 && sizeof(cuda::Chunk) % 8 == 0);

cuda::Class class_of(const core::Storage& storage) {
  bool direct = storage.keep == core::Keep::nothing && !storage.stochastic;
  for (const Format state : storage.states) direct = direct && state == storage.param;
  if (direct && storage.param == Format::fp32) return cuda::Class::fp32;
  return storage.param == Format::fp64 ? cuda::Class::fp64 : cuda::Class::mixed;
}

// A control block's numbers by value, where they fit; else the device's block gets them.
void give(Queue& queue, const DeviceStep& step, Job& job) {
  const Given& given = step.given;
  job.settings = {};
  if (!given.numbers) return;
  const auto& head = *reinterpret_cast<const core::Control*>(given.numbers);
  if (given.n_rows > cuda::Settings::max_rows) {
    const int64_t n = core::control_head + core::control_row * given.n_rows;
    if (given.fresh) queue.upload(reinterpret_cast<const int64_t*>(given.numbers), n, step.control);
    return;
  }
  job.settings.inv_scale = head.inv_scale;
  job.settings.clip_value = head.clip_value;
  job.settings.fresh = given.fresh;
  job.settings.n_rows = given.n_rows;
  for (int64_t r = 0; r < given.n_rows; ++r) {
    const core::GroupRow& from = head.rows()[r];
    cuda::Settings::Row& to = job.settings.rows[r];
    to.grad_sign = from.grad_sign;
    to.ema_weight = from.ema_weight;
    std::copy(std::begin(from.hypers), std::end(from.hypers), to.hypers);
  }
}

}  // namespace

const cuda::Backend* backend_of(int64_t device) {
  if (device == cpu_device) return simt_backend.load(std::memory_order_acquire);
  const cuda::Backend* const found = cuda_backend.load(std::memory_order_acquire);
  STD_TORCH_CHECK(found != nullptr, "there are no kernels for device cuda:", device,
                  "; pytrain.info() says why they were not loaded");
  return found;
}

bool has_kernels(int64_t device) {
  return device == cpu_device || cuda_backend.load(std::memory_order_acquire) != nullptr;
}

bool simulates() { return simt_backend.load(std::memory_order_acquire) != nullptr; }

Queue::Queue(int64_t device) : device_(device), backend_(backend_of(device)) {}

void Queue::check(const char* error, const char* what) const {
  STD_TORCH_CHECK(error == nullptr, what, ": a launch failed on device ",
                  device_ == cpu_device ? std::string("cpu") : "cuda:" + std::to_string(device_), ": ", error);
}

Handle Queue::room(int64_t n_words) const {
  static const int32_t cuda_type = aoti_torch_device_type_cuda(), cpu_type = aoti_torch_device_type_cpu();
  const bool cpu = device_ == cpu_device;
  const int64_t size = std::max<int64_t>(n_words, 1), stride = 1;
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_int64(),
                                                         cpu ? cpu_type : cuda_type,
                                                         cpu ? 0 : static_cast<int32_t>(device_), &made));
  return Handle(made);
}

void* Queue::memory(const Handle& room) {
  void* data;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(room.get(), &data));
  return data;
}

void Queue::upload(const int64_t* words, int64_t n, void* to) {
  run([&](void* stream) {
    cuda::Piece piece;
    for (int64_t at = 0; at < n; at += cuda::Piece::max_words) {
      piece.n = std::min(n - at, cuda::Piece::max_words);
      std::copy(words + at, words + at + piece.n, piece.words);
      check(backend_->upload(piece, static_cast<int64_t*>(to) + at, stream), "upload");
    }
  });
}

void DeviceTable::cut(const std::vector<Item>& items) {
  bool same = cut_ > 0 && numels_.size() == items.size();
  for (size_t i = 0; same && i < items.size(); ++i) same = numels_[i] == items[i].memory.numel;
  if (same) return;
  ++cut_;
  numels_.clear();
  chunks_.clear();
  large_.clear();
  for (size_t i = 0; i < items.size(); ++i) {
    const int64_t numel = items[i].memory.numel, begin = static_cast<int64_t>(chunks_.size()) / chunk_words;
    numels_.push_back(numel);
    for (int64_t first = 0; first < numel; first += cuda::chunk) {
      chunks_.push_back(static_cast<int64_t>(i));
      chunks_.push_back(first);
    }
    const int64_t end = static_cast<int64_t>(chunks_.size()) / chunk_words;
    if (end - begin > cuda::few_chunks) large_.push_back(static_cast<int64_t>(i));
  }
}

// Memory is of one stream's: another one takes its own, so that torch's allocator may give it on.
DeviceTable::Memory& DeviceTable::memory_for(const Queue& queue, void* stream, int64_t size) {
  const uint64_t capture = queue.backend().capture(stream);
  if (!capture) {
    if (size > eager_.size || stream != eager_.stream || !eager_.room.get()) {
      eager_ = {queue.room(size), size, stream, 0, 0, {}};
    }
    return eager_;
  }
  Memory* found = nullptr;
  for (Memory& memory : captured_) {
    if (memory.capture != capture) {
      std::vector<int64_t>().swap(memory.words);  // another capture: it is over, or will write anew
    } else if (memory.stream == stream && memory.size >= size) {
      found = &memory;
    }
  }
  if (found) return *found;
  captured_.push_back({queue.room(size), size, stream, capture, 0, {}});
  return captured_.back();
}

// Uploads the words that differ, in the fewest launches that this takes.
void DeviceTable::write(Queue& queue, Memory& memory, const std::vector<Item>& items, int64_t n_words) const {
  auto* const to = static_cast<int64_t*>(Queue::memory(memory.room));
  const bool everything = static_cast<int64_t>(memory.words.size()) != n_words;
  if (everything) memory.words.assign(n_words, 0);
  int64_t at = 0;
  const auto next = [&](const int64_t* words, int64_t count) {
    for (int64_t i = 0; i < count; i += cuda::Piece::max_words) {
      const int64_t m = std::min(count - i, cuda::Piece::max_words);
      if (!everything && std::equal(words + i, words + i + m, memory.words.begin() + at + i)) continue;
      std::copy(words + i, words + i + m, memory.words.begin() + at + i);
      if (!everything) queue.upload(words + i, m, to + at + i);
    }
    at += count;
  };
  next(reinterpret_cast<const int64_t*>(items.data()), static_cast<int64_t>(items.size()) * item_words);
  if (everything || memory.cut != cut_) {
    next(chunks_.data(), static_cast<int64_t>(chunks_.size()));
    next(large_.data(), static_cast<int64_t>(large_.size()));
    memory.cut = cut_;
  }
  if (everything) queue.upload(memory.words.data(), n_words, to);
}

void DeviceTable::load(Queue& queue, void* stream, std::vector<Item>& items, Job& job) {
  cut(items);
  const int64_t n = static_cast<int64_t>(items.size()), n_chunks = static_cast<int64_t>(chunks_.size()) / chunk_words;
  int64_t begin = 0;
  for (Item& item : items) {
    item.first_chunk = begin;
    item.n_chunks = (item.memory.numel + cuda::chunk - 1) / cuda::chunk;
    begin += item.n_chunks;
  }
  // Items, chunks, large and ticket lie in a row, as they are uploaded; then what only the device writes.
  const int64_t at_chunks = n * item_words, at_large = at_chunks + n_chunks * chunk_words;
  const int64_t at_ticket = at_large + static_cast<int64_t>(large_.size()), n_words = at_ticket + 1;
  const int64_t room = n_words + (n_chunks + n) * core::max_sums;
  Memory& kept = memory_for(queue, stream, room);
  try {
    write(queue, kept, items, n_words);
  } catch (...) {
    kept.words.clear();  // what stands there now is unknown
    throw;
  }
  auto* const memory = static_cast<int64_t*>(Queue::memory(kept.room));
  job.items = reinterpret_cast<const Item*>(memory);
  job.chunks = reinterpret_cast<const cuda::Chunk*>(memory + at_chunks);
  job.large = memory + at_large;
  job.ticket = reinterpret_cast<unsigned*>(memory + at_ticket);
  job.partials = reinterpret_cast<double*>(memory + n_words);
  job.totals = job.partials + n_chunks * core::max_sums;
  job.n_items = n;
  job.n_chunks = n_chunks;
  job.n_large = static_cast<int64_t>(large_.size());
  job.first_item = job.first_chunk = 0;
}

void run_on_device(Queue& queue, DeviceTable& table, std::vector<Item>& items, const DeviceStep& step,
                   Launches launches) {
  const cuda::Backend& backend = queue.backend();
  const cuda::Class kind = class_of(step.storage);
  const int64_t width = backend.multiprocessors(queue.device());
  queue.run([&](void* stream) {
    Job job{};
    give(queue, step, job);
    job.storage = step.storage;
    job.control = step.control;
    job.n_rows = step.n_rows;
    table.load(queue, stream, items, job);
    if (launches == Launches::stats) return queue.check(backend.stats(job, *step.then, width, stream), "pass 1");
    job.moved = step.moved;
    if (!step.serial) job.scaler = step.scaler;
    if (step.sums) job.totals = step.sums;
    if (step.measures && (launches == Launches::sums || !step.sums)) {
      queue.check(backend.step(kind, step.rule, true, job, width, stream), "sums");
    }
    if (launches == Launches::sums) return;
    if (!step.serial) return queue.check(backend.step(kind, step.rule, false, job, width, stream), "step");
    for (size_t i = 0; i < items.size(); ++i) {
      job.first_item = static_cast<int64_t>(i);
      job.n_items = job.first_item + 1;
      job.first_chunk = items[i].first_chunk;
      job.n_chunks = items[i].first_chunk + items[i].n_chunks;
      if (i + 1 == items.size()) job.scaler = step.scaler;
      queue.check(backend.step(kind, step.rule, false, job, width, stream), "step");
    }
  });
}

namespace {

// _backend(int address, bool simulated) -> (): a library of kernels, by the address of its table; 0 takes it back.
void set_backend(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  const auto address = static_cast<std::uintptr_t>(to<int64_t>(stack[0]));
  const auto* const backend = reinterpret_cast<const cuda::Backend*>(address);
  STD_TORCH_CHECK(!backend || backend->bytes == cuda::bytes_of_build,
                  "_backend: the libraries of kernels come from different builds of pytrain; install it again");
  (to<bool>(stack[1]) ? simt_backend : cuda_backend).store(backend, std::memory_order_release);
}

// _capture(int device) -> int: which capture makes a graph of what is queued on this device's stream now; 0: none.
void capture(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::from;
  Queue queue(torch::stable::detail::to<int64_t>(stack[0]));
  uint64_t id = 0;
  queue.run([&](void* stream) { id = queue.backend().capture(stream); });
  stack[0] = from(static_cast<int64_t>(id));
}

// _upload(Tensor(a!) to, Tensor numbers) -> (): float64 numbers of the CPU to a device, without waiting for it.
void upload(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  const Handle target(to<AtenTensorHandle>(stack[0])), source(to<AtenTensorHandle>(stack[1]));
  const View there = view(target.get(), true), here = view(source.get(), false);
  STD_TORCH_CHECK(there.usable && here.usable && there.contiguous && here.contiguous && here.device == cpu_device &&
                      there.format == Format::fp64 && here.format == Format::fp64 && there.numel == here.numel,
                  "_upload: expected two contiguous float64 tensors of one size, the second on the CPU");
  Queue(there.device).upload(static_cast<const int64_t*>(here.data), here.numel, there.data);
}

}  // namespace
}  // namespace pytrain::ops

STABLE_TORCH_LIBRARY_FRAGMENT(pytrain, m) {
  m.def("_backend(int address, bool simulated) -> ()");
  m.def("_capture(int device) -> int");
  m.def("_upload(Tensor(a!) to, Tensor numbers) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pytrain, CompositeExplicitAutograd, m) {
  m.impl("_backend", &pytrain::ops::set_backend);
  m.impl("_capture", &pytrain::ops::capture);
  m.impl("_upload", &pytrain::ops::upload);
}
