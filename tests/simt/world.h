// A step as a device has it: the parameters' memory, each tensor between sentinels, and the tables that a launch reads,
// laid out by hand as csrc/ops does it.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cuda/backend.h"
#include "kernels/problem.h"
#include "kernels/reference.h"
#include "simt/watch.h"

#if defined(__SANITIZE_ADDRESS__)
#define PT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define PT_ASAN 1
#endif
#endif
#ifdef PT_ASAN
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) (static_cast<void>(address), static_cast<void>(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) (static_cast<void>(address), static_cast<void>(size))
#endif

namespace cuda = pytrain::cuda;

// Memory that is given out piece by piece, with sentinels between the pieces; a sanitizer forbids touching those.
class Arena {
 public:
  Arena(size_t capacity, bool counted)
      : capacity_((capacity + page - 1) / page * page),
        memory_(static_cast<unsigned char*>(std::aligned_alloc(page, capacity_)), std::free) {
    if (!memory_) std::abort();
    simt::watch_memory(memory_.get(), capacity_, counted);
    sentinels();
  }
  ~Arena() {
    ASAN_UNPOISON_MEMORY_REGION(memory_.get(), capacity_);
    simt::forget_memory(memory_.get());
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // `shift`: how many bytes off the alignment that a device's allocator gives.
  void* take(size_t bytes, size_t shift = 0) {
    sentinels(shift);
    unsigned char* const piece = memory_.get() + used_;
    if (used_ + bytes + 2 * page > capacity_) std::abort();
    ASAN_UNPOISON_MEMORY_REGION(piece, bytes);
    std::memset(piece, 0, bytes);
    used_ += bytes;
    pieces_.push_back({piece, bytes});
    sentinels();
    return piece;
  }
  // The same bytes in all of it, sentinels too.
  bool operator==(const Arena& other) const {
    open();
    other.open();
    const bool same = used_ == other.used_ && !std::memcmp(memory_.get(), other.memory_.get(), used_);
    close();
    other.close();
    return same;
  }

 private:
  static constexpr size_t page = 256;
  struct Piece {
    unsigned char* begin;
    size_t bytes;
  };

  void sentinels(size_t shift = 0) {
    const size_t end = shift ? used_ + shift : (used_ + page) / page * page + page;
    std::memset(memory_.get() + used_, 0xA5, end - used_);
    ASAN_POISON_MEMORY_REGION(memory_.get() + used_, end - used_);
    used_ = end;
  }
  void open() const { ASAN_UNPOISON_MEMORY_REGION(memory_.get(), used_); }
  void close() const {
    ASAN_POISON_MEMORY_REGION(memory_.get(), used_);
    for (const Piece& piece : pieces_) ASAN_UNPOISON_MEMORY_REGION(piece.begin, piece.bytes);
  }

  const size_t capacity_;
  std::unique_ptr<unsigned char, void (*)(void*)> memory_;
  size_t used_ = 0;
  std::vector<Piece> pieces_;
};

// What tensors there are, and where.
struct Shape {
  std::vector<int64_t> counts;
  unsigned shifted = 0;  // one bit a stream, in the order of Stream: is it one element off?
  int groups = 2;
};
enum Stream : unsigned { of_param, of_grad, of_states, of_kept = of_states + 4, of_ema, every_stream = 0xff };

// Elements whose gradient and states are all 0: one block of 8-bit codes.
inline bool zero_block(int64_t i) { return i / 256 == 1; }

class World {
 public:
  Storage storage;
  std::vector<Segment> segments;  // as a reference wants them
  std::vector<Extra> extras;
  cuda::Job job{};

  World(const RuleUnderTest& rule, const Storage& how, const Shape& shape)
      : storage(how), memory_(room(shape), true), tables_(room_of_tables(shape), false), shifted_(shape.shifted) {
    Random random;
    for (size_t k = 0; k < shape.counts.size(); ++k) {
      add(rule, shape.counts[k], random);
      segments.back().group = static_cast<int64_t>(k) % shape.groups;
      segments.back().step = 1.0 + static_cast<double>(k / 2 % 3 * 3);
      extras.back().index = 7 * static_cast<int64_t>(k) + 1;
      extras.back().begin = pytrain::core::random_tile * static_cast<int64_t>(k % 3);  // every third is whole
      extras.back().whole = shape.counts[k] + 2 * extras.back().begin;
    }
    lay_tables();
    control(rule, shape.groups);
  }

  pytrain::core::Control& head() { return *job.control; }
  pytrain::core::GroupRow& row(int64_t group) { return job.control->rows()[group]; }
  int64_t groups() const { return job.n_rows; }

  // Hands the rows to the launch by value, or leaves them in the control block.
  void settings(bool by_value, bool fresh) {
    job.settings = {};
    job.settings.inv_scale = head().inv_scale;
    job.settings.clip_value = by_value ? head().clip_value : 0.0;
    job.settings.fresh = fresh;
    job.settings.n_rows = by_value ? job.n_rows : 0;
    for (int64_t g = 0; g < job.settings.n_rows; ++g) {
      cuda::Settings::Row& to = job.settings.rows[g];
      to.grad_sign = row(g).grad_sign;
      to.ema_weight = row(g).ema_weight;
      std::memcpy(to.hypers, row(g).hypers, sizeof to.hypers);
    }
  }

  bool same_memory(const World& other) const { return memory_ == other.memory_; }
  // Counts, scalars and the control block beside the parameters; the ticket is 0 again.
  bool same_numbers(const World& other) const {
    const size_t bytes = numbers_ * sizeof(float);
    const size_t block = sizeof(pytrain::core::Control) + job.n_rows * sizeof(pytrain::core::GroupRow);
    return !std::memcmp(first_number_, other.first_number_, bytes) && *job.ticket == 0 &&
           !std::memcmp(job.control, other.job.control, block);
  }
  bool same_tables(const World& other) const {  // but for addresses
    return job.n_items == other.job.n_items && job.n_chunks == other.job.n_chunks &&
           !std::memcmp(job.chunks, other.job.chunks, job.n_chunks * sizeof(cuda::Chunk));
  }
  // What a step leaves beside the parameters, of a reference that has done it.
  void set_numbers(size_t k, double count, const double* scalars) {
    if (items_[k].count) *items_[k].count = static_cast<float>(count);
    for (int s = 0; s < pytrain::core::max_scalars; ++s) {
      if (items_[k].scalars[s]) *items_[k].scalars[s] = static_cast<float>(scalars[s]);
    }
  }

 private:
  static size_t room(const Shape& shape) {
    size_t bytes = 1 << 14;
    for (const int64_t n : shape.counts) bytes += 17 * 1024 + static_cast<size_t>(n) * 8 * 9;
    return bytes;
  }
  static size_t room_of_tables(const Shape& shape) {
    size_t bytes = 1 << 16;
    for (const int64_t n : shape.counts) bytes += 1024 + static_cast<size_t>(n / cuda::chunk + 1) * 64;
    return bytes + shape.groups * sizeof(pytrain::core::GroupRow);
  }

  template <class Value>
  void* fill(unsigned stream, Format format, int64_t n, Value value) {
    const int64_t size = bytes(format);
    void* const memory = memory_.take(n * size, shifted_ >> stream & 1 ? size : 0);
    for (int64_t i = 0; i < n; ++i) put(format, memory, i, value(i));
    return memory;
  }

  void add(const RuleUnderTest& rule, int64_t n, Random& random) {
    Segment segment{};
    Extra extra{};
    segment.numel = n;
    segment.param = fill(of_param, storage.param, n, [&](int64_t) { return 2.0 * random.next() - 1.0; });
    segment.grad = fill(of_grad, storage.param, n, [&](int64_t i) {
      const double value = 2.0 * random.next() - 1.0;
      return zero_block(i) ? 0.0 : value;
    });
    for (int s = 0; s < rule.n_states; ++s) {
      const Format format = storage.states[s];
      const bool above = positive(rule.states[s]);  // and above the square of what has a sign, for a variance
      segment.states[s] = fill(of_states + s, format, n, [&](int64_t i) {
        const double value = above ? 0.25 + 0.75 * random.next() : 0.8 * random.next() - 0.4;
        return zero_block(i) ? 0.0 : value;
      });
      if (bytes(format) > 1) continue;
      const int64_t blocks = (n + pytrain::core::code_block - 1) / pytrain::core::code_block;
      extra.scales[s] = static_cast<float*>(
          fill(of_states + s, Format::fp32, blocks, [&](int64_t) { return 0.9 + 0.1 * random.next(); }));
    }
    if (storage.keep == Keep::master) {  // two in three hold
      extra.kept = fill(of_kept, Format::fp32, n, [&](int64_t i) {
        return get(storage.param, segment.param, i) * (1.0 + (i % 3 ? 1e-4 : 0.1) * random.next());
      });
    } else if (storage.keep == Keep::low_bits) {
      extra.kept = fill(of_kept, Format::i16, n, [&](int64_t) { return random.next(); });
    } else if (storage.keep == Keep::compensation) {
      extra.kept = fill(of_kept, storage.param, n, [&](int64_t i) {
        return get(storage.param, segment.param, i) * (random.next() - 0.5) * 0x1p-8;
      });
    }
    const Format wide = storage.param == Format::fp64 ? Format::fp64 : Format::fp32;
    if (storage.ema) extra.ema = fill(of_ema, wide, n, [&](int64_t) { return random.next(); });
    for (double& scalar : extra.scalars) scalar = 0.5;
    segments.push_back(segment);
    extras.push_back(extra);
  }

  // As DeviceTable in csrc/ops/device.cpp.
  void lay_tables() {
    const auto n = static_cast<int64_t>(segments.size());
    items_ = static_cast<cuda::Item*>(tables_.take(n * sizeof(cuda::Item)));
    numbers_ = n * (1 + pytrain::core::max_scalars);
    first_number_ = static_cast<float*>(tables_.take(numbers_ * sizeof(float)));
    int64_t n_chunks = 0, n_large = 0;
    for (int64_t i = 0; i < n; ++i) {
      float* const numbers = first_number_ + i * (1 + pytrain::core::max_scalars);
      cuda::Item& item = items_[i];
      item.memory = segments[i];
      item.extra = extras[i];
      item.count = numbers;
      *item.count = static_cast<float>(segments[i].step - 1.0);
      for (int s = 0; s < pytrain::core::max_scalars; ++s) {
        item.scalars[s] = numbers + 1 + s;
        *item.scalars[s] = static_cast<float>(extras[i].scalars[s]);
      }
      item.first_chunk = n_chunks;
      item.n_chunks = (segments[i].numel + cuda::chunk - 1) / cuda::chunk;
      n_chunks += item.n_chunks;
      n_large += item.n_chunks > cuda::few_chunks;
    }
    auto* const chunks = static_cast<cuda::Chunk*>(tables_.take(n_chunks * sizeof(cuda::Chunk)));
    auto* const large = static_cast<int64_t*>(tables_.take(n_large * sizeof(int64_t)));
    for (int64_t i = 0, at = 0, l = 0; i < n; ++i) {
      for (int64_t c = 0; c < items_[i].n_chunks; ++c) chunks[at++] = {i, c * cuda::chunk};
      if (items_[i].n_chunks > cuda::few_chunks) large[l++] = i;
    }
    job.storage = storage;
    job.items = items_;
    job.chunks = chunks;
    job.large = large;
    job.n_items = n;
    job.n_chunks = n_chunks;
    job.n_large = n_large;
    job.ticket = static_cast<unsigned*>(tables_.take(sizeof(unsigned)));
    job.partials = static_cast<double*>(tables_.take(n_chunks * pytrain::core::max_sums * sizeof(double)));
    job.totals = static_cast<double*>(tables_.take(n * pytrain::core::max_sums * sizeof(double)));
    for (int64_t i = 0; i < n_chunks * pytrain::core::max_sums; ++i) job.partials[i] = std::nan("");
    for (int64_t i = 0; i < n * pytrain::core::max_sums; ++i) job.totals[i] = std::nan("");
  }

  void control(const RuleUnderTest& rule, int groups) {
    job.n_rows = groups;
    job.control = static_cast<pytrain::core::Control*>(
        tables_.take(sizeof(pytrain::core::Control) + groups * sizeof(pytrain::core::GroupRow)));
    head() = rule.control.head;
    for (int g = 0; g < groups; ++g) {
      row(g) = rule.control.rows[g % 2];
      row(g).hypers[0] *= 1.0 + g / 16.0;
    }
  }

  Arena memory_, tables_;
  const unsigned shifted_;
  cuda::Item* items_ = nullptr;
  float* first_number_ = nullptr;
  size_t numbers_ = 0;
};
