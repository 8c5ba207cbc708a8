// The race and traffic checker: a runtime of our own behind the calls that -fsanitize=thread puts before each access.
//
// The rules are the GPU's. Two accesses to a byte, one of them a write, are a race
//   - in one block: by two threads, unless the block has met between them, or the whole warp of both has;
//   - in two blocks: unless the first was published and the second has acquired. Published: a fence of the same thread
//     came after it, or one of any thread after a meeting of the block; and after that fence, by its thread or after
//     another meeting, the block drew a ticket (an atomic operation on global memory). Acquired: the second block drew
//     one later, and the thread has passed a fence since, or a meeting after another thread's fence.
// Atomics do not race with each other. A meeting of part of a warp orders nothing here. Launches follow each other.
#include "simt/watch.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

namespace simt {
namespace {

constexpr int warp = 32, max_threads = 1024;
constexpr int16_t many = -1;  // threads of several warps; -2 - w are several of warp w

struct Stamp {
  uint32_t launch;
  uint16_t block, epoch, meeting;
  int16_t thread;
  uint16_t fences;
  bool atomic;
};

// Of the accesses of blocks before: are there any, and are there any that were not published?
struct Earlier {
  uint32_t launch;
  bool published, open;
};

struct Byte {
  Stamp write, read;
  Earlier reads, atomics;
};

struct Range {
  const char* begin;
  size_t size;
  bool counted, shared;
  std::unique_ptr<Byte, void (*)(void*)> bytes;  // from calloc: most of it is never touched
};

// How far a thread has come, or had when its block drew a ticket.
struct Thread {
  int fences = 0, fence_epoch = -1;                  // how many, and when the last was
  int settled_fences = 0, settled_fence_epoch = -1;  // those before the last meeting of the block
};

// The draw of a block, and what it published.
struct Draw {
  const char* ticket = nullptr;
  size_t bytes = 0;
  unsigned thread = 0;
  int epoch = 0, fences = 0;      // when it was
  int published_epoch = -1;       // all before this epoch
  std::vector<int> fences_of;     // and each thread's accesses before this fence of its own
  int least = 0;                  // of those
  int acquired_epoch = 1 << 30;   // first epoch after the draw in which a thread passed a fence
};

struct Block {
  unsigned number = 0, threads = 0, thread = 0;
  const char* stack = nullptr;
  size_t stack_bytes = 0;
  int epoch = 0;
  int meetings[max_threads / warp] = {};
  Thread of[max_threads];
};

std::map<const char*, Range> ranges;
const Range* last = nullptr;
std::map<unsigned, Draw> draws;
Block block;
uint32_t launch_number = 0;
bool running = false, counting = false;
int64_t n_conflicts = 0;

// ---- traffic --------------------------------------------------------------------------------------------------------

// One instruction of a warp: its place in the program, the warp, and how often the thread had been there.
using Instruction = std::tuple<const void*, unsigned, int, bool>;
struct Asked {
  std::vector<std::pair<const char*, size_t>> by;
};
Traffic traffic;
std::map<Instruction, Asked> asked;
std::map<std::pair<const void*, unsigned>, int> visits;

void count(const char* at, size_t size, bool write, const void* place) {
  for (int s = 0; s < 5; ++s) traffic.accesses[s] += size == size_t{1} << s;
  const int visit = visits[{place, block.thread}]++;
  asked[{place, block.thread / warp, visit, write}].by.emplace_back(at, size);
}

void end_traffic() {
  for (auto& [instruction, all] : asked) {
    std::sort(all.by.begin(), all.by.end());
    const char* end = nullptr;
    std::uintptr_t sector = 0;
    int64_t bytes = 0;
    for (const auto& [at, size] : all.by) {
      const char* const from = std::max(at, end);
      if (from < at + size) bytes += at + size - from;
      end = std::max(end, at + size);
      const auto begin = reinterpret_cast<std::uintptr_t>(at);
      for (std::uintptr_t s = std::max(begin / 32, sector); s <= (begin + size - 1) / 32; ++s) {
        ++traffic.sectors;
        sector = s + 1;
      }
    }
    (std::get<3>(instruction) ? traffic.written : traffic.read) += bytes;
  }
  asked.clear();
  visits.clear();
}

// ---- races ----------------------------------------------------------------------------------------------------------

int warp_of(int16_t thread) { return thread <= -2 ? -2 - thread : thread / warp; }

Stamp stamp(bool atomic) {
  const unsigned t = block.thread;
  const auto narrow = [](int number) { return static_cast<uint16_t>(number); };
  return {launch_number, narrow(block.number),     narrow(block.epoch),        narrow(block.meetings[t / warp]),
          static_cast<int16_t>(t), narrow(block.of[t].fences), atomic};
}

bool before_in_block(const Stamp& a) {
  if (a.epoch < block.epoch || a.thread == static_cast<int>(block.thread)) return true;
  return a.thread != many && warp_of(a.thread) == static_cast<int>(block.thread / warp) &&
         a.meeting < block.meetings[block.thread / warp];
}

bool published(const Stamp& a, const char* at) {
  const auto found = draws.find(static_cast<unsigned>(a.block));
  if (found == draws.end()) return false;
  const Draw& draw = found->second;
  if (a.atomic && at >= draw.ticket && at < draw.ticket + draw.bytes) return true;
  return a.epoch < draw.published_epoch || (a.thread < 0 ? draw.least : draw.fences_of[a.thread]) > a.fences;
}

bool acquired() {
  const auto found = draws.find(block.number);
  if (found == draws.end()) return false;
  const Draw& draw = found->second;
  const Thread& me = block.of[block.thread];
  if (block.epoch > draw.acquired_epoch) return true;
  return block.thread == draw.thread ? me.fences > draw.fences : me.fence_epoch > draw.epoch;
}

bool ordered(const Stamp& a, const char* at) {
  if (a.launch != launch_number) return true;
  if (a.block == static_cast<int>(block.number)) return before_in_block(a);
  return published(a, at) && acquired();
}

void report(const Range& range, const char* at, bool write, const char* other) {
  if (++n_conflicts > 10) return;
  std::fprintf(stderr, "race: a %s at byte %td of %s memory, by block %u thread %u, with %s\n",
               write ? "write" : "read", at - range.begin, range.shared ? "shared" : "global", block.number,
               block.thread, other);
}

// Keeps of an earlier block's access only whether it was published.
void retire(Earlier& all, const Stamp& a, const char* at) {
  if (a.launch != launch_number || a.block == static_cast<int>(block.number)) return;
  if (all.launch != launch_number) all = {launch_number, false, false};
  (published(a, at) ? all.published : all.open) = true;
}

bool ordered(const Earlier& all) {
  return all.launch != launch_number || (!all.open && (!all.published || acquired()));
}

// One byte of an access; what it races with, or nothing.
const char* check(Byte& b, const char* at, bool write, bool atomic) {
  const bool both = atomic && b.write.atomic;
  const char* const other = !both && !ordered(b.write, at)                     ? "a write"
                            : !atomic && !ordered(b.atomics)                    ? "an atomic operation"
                            : write && !(ordered(b.read, at) && ordered(b.reads)) ? "a read"
                                                                                : nullptr;
  if (write) {
    if (both) retire(b.atomics, b.write, at);
    b.write = stamp(atomic);
    return other;
  }
  retire(b.reads, b.read, at);
  Stamp now = stamp(false);
  const Stamp& a = b.read;
  if (a.launch == launch_number && a.block == now.block && !before_in_block(a)) {
    const bool one_warp = a.thread != many && warp_of(a.thread) == now.thread / warp;
    now.thread = one_warp ? static_cast<int16_t>(-2 - now.thread / warp) : many;
    now.fences = std::max(now.fences, a.fences);
  }
  b.read = now;
  return other;
}

const Range* find(const char* at) {
  if (last && at >= last->begin && at < last->begin + last->size) return last;
  auto after = ranges.upper_bound(at);
  if (after == ranges.begin()) return nullptr;
  const Range& range = std::prev(after)->second;
  if (at >= range.begin + range.size) return nullptr;
  return last = &range;
}

void access(const void* memory, size_t size, bool write, bool atomic, const void* place) {
  if (!running) return;
  const auto* const at = static_cast<const char*>(memory);
  if (at >= block.stack && at < block.stack + block.stack_bytes) return;
  const Range* const range = find(at);
  if (!range) return;
  const char* race = nullptr;
  for (size_t i = 0; i < size; ++i) {
    Byte& b = range->bytes.get()[at + i - range->begin];
    if (!write && range->shared && b.write.launch == 0) race = "nothing that was written there";
    const char* const found = check(b, at + i, write, atomic);
    race = race ? race : found;
  }
  if (race) report(*range, at, write, race);
  if (counting && range->counted) count(at, size, write, place);
}

void draw(const void* memory, size_t bytes) {
  const auto* const at = static_cast<const char*>(memory);
  const Range* const range = running ? find(at) : nullptr;
  if (!range || range->shared) return;
  Draw& d = draws[block.number];
  d = {};
  d.ticket = at;
  d.bytes = bytes;
  d.thread = block.thread;
  d.epoch = block.epoch;
  d.fences = block.of[block.thread].fences;
  d.least = 1 << 30;
  for (unsigned t = 0; t < block.threads; ++t) {
    const bool own = t == block.thread;
    const Thread& thread = block.of[t];
    d.fences_of.push_back(own ? thread.fences : thread.settled_fences);
    d.least = std::min(d.least, d.fences_of.back());
    d.published_epoch = std::max(d.published_epoch, own ? thread.fence_epoch : thread.settled_fence_epoch);
  }
}

void add(const void* memory, size_t bytes, bool counted, bool shared) {
  last = nullptr;
  const auto* const begin = static_cast<const char*>(memory);
  auto* const touched = static_cast<Byte*>(std::calloc(bytes, sizeof(Byte)));
  ranges.erase(begin);
  ranges.emplace(begin, Range{begin, bytes, counted, shared, {touched, std::free}});
}

void forget_shared() {
  last = nullptr;
  for (auto at = ranges.begin(); at != ranges.end();) at = at->second.shared ? ranges.erase(at) : std::next(at);
}

}  // namespace

void watch_launch() {
  ++launch_number;
  draws.clear();
}

void watch_end() {
  running = false;
  end_traffic();
  forget_shared();
}

void watch_block(unsigned number, unsigned threads) {
  end_traffic();
  forget_shared();
  block = {};
  block.number = number;
  block.threads = threads;
}

void watch_thread(unsigned thread, const char* stack, size_t bytes) {
  running = true;
  block.thread = thread;
  block.stack = stack;
  block.stack_bytes = bytes;
}

void watch_barrier() {
  ++block.epoch;
  for (unsigned t = 0; t < block.threads; ++t) {
    block.of[t].settled_fences = block.of[t].fences;
    block.of[t].settled_fence_epoch = block.of[t].fence_epoch;
  }
}

void watch_meeting(unsigned first, unsigned mask) {
  const unsigned n = std::min<unsigned>(warp, block.threads - first);
  if (mask == (n == warp ? ~0u : (1u << n) - 1)) ++block.meetings[first / warp];
}

void watch_fence() {
  Thread& me = block.of[block.thread];
  ++me.fences;
  me.fence_epoch = block.epoch;
  const auto found = draws.find(block.number);
  if (found == draws.end()) return;
  Draw& d = found->second;
  const bool after = block.thread == d.thread || block.epoch > d.epoch;
  if (after) d.acquired_epoch = std::min(d.acquired_epoch, block.epoch);
}

void watch_shared(const void* memory, size_t bytes) { add(memory, bytes, false, true); }

void watch_memory(const void* memory, size_t bytes, bool counted) { add(memory, bytes, counted, false); }

void forget_memory(const void* memory) {
  last = nullptr;
  ranges.erase(static_cast<const char*>(memory));
}

int64_t conflicts() { return n_conflicts; }

Traffic take_traffic() {
  counting = true;
  return std::exchange(traffic, {});
}

}  // namespace simt

// ---- what the compiler calls ----------------------------------------------------------------------------------------

#define PLACE __builtin_return_address(0)
#define ACCESS(name, size, write) \
  void __tsan_##name(void* at) { simt::access(at, size, write, false, PLACE); }
#define ACCESSES(size)                            \
  ACCESS(read##size, size, false)                 \
  ACCESS(write##size, size, true)                 \
  ACCESS(unaligned_read##size, size, false)       \
  ACCESS(unaligned_write##size, size, true)       \
  ACCESS(volatile_read##size, size, false)        \
  ACCESS(volatile_write##size, size, true)        \
  ACCESS(unaligned_volatile_read##size, size, false) \
  ACCESS(unaligned_volatile_write##size, size, true)
#define ATOMICS(bits, type)                                                                     \
  type __tsan_atomic##bits##_load(const type* at, int) {                                        \
    simt::access(at, sizeof(type), false, true, PLACE);                                         \
    return *at;                                                                                 \
  }                                                                                             \
  type __tsan_atomic##bits##_fetch_add(type* at, type value, int) {                             \
    simt::access(at, sizeof(type), true, true, PLACE);                                          \
    simt::draw(at, sizeof(type));                                                                             \
    const type before = *at;                                                                    \
    *at = before + value;                                                                       \
    return before;                                                                              \
  }                                                                                             \
  int __tsan_atomic##bits##_compare_exchange_strong(type* at, type* expected, type value, int, int) { \
    simt::access(at, sizeof(type), true, true, PLACE);                                          \
    simt::draw(at, sizeof(type));                                                                             \
    const bool equal = *at == *expected;                                                        \
    (equal ? *at : *expected) = equal ? value : *at;                                            \
    return equal;                                                                               \
  }

extern "C" {
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
ATOMICS(32, unsigned)
ATOMICS(64, unsigned long)
void __tsan_read_range(void* at, size_t bytes) { simt::access(at, bytes, false, false, PLACE); }
void __tsan_write_range(void* at, size_t bytes) { simt::access(at, bytes, true, false, PLACE); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  simt::access(from, bytes, false, false, PLACE);
  simt::access(to, bytes, true, false, PLACE);
  return std::memcpy(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  simt::access(to, bytes, true, false, PLACE);
  return std::memset(to, value, bytes);
}
}
