// Fibers, their scheduler, and the meetings of a thread block.
#include "simt/shim.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include <sys/mman.h>

#include "simt/watch.h"

#if defined(__SANITIZE_ADDRESS__)
#define PT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define PT_ASAN 1
#endif
#endif
#ifdef PT_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

thread_local simt::Index threadIdx, blockIdx, blockDim, gridDim;

// ---- switching stacks -----------------------------------------------------------------------------------------------

#if defined(__x86_64__)
// Saves what a function has to keep, and the stack pointer to *from; goes on where `to` was saved.
extern "C" void pt_simt_switch(void** from, void* to);
asm(R"(
.text
.hidden pt_simt_switch
.globl pt_simt_switch
.type pt_simt_switch, @function
pt_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pt_simt_switch, .-pt_simt_switch
)");
#else
#include <ucontext.h>
#endif

namespace simt {
namespace {

constexpr size_t stack_bytes = 256 * 1024;
constexpr unsigned warp = 32;

enum class State { ready, in_block, in_warp, done };

struct Fiber {
  char* stack = nullptr;
#if defined(__x86_64__)
  void* context = nullptr;
#else
  ucontext_t context;
#endif
  void* asan = nullptr;
  State state = State::done;
  unsigned mask = 0;
  const char* file = "";
  int line = 0;
  uint64_t given = 0, shown = 0;  // to an exchange, before and after all have met
};

struct Pool {
  std::vector<Fiber> fibers;
#if defined(__x86_64__)
  void* home = nullptr;
#else
  ucontext_t home;
#endif
  void* home_asan = nullptr;
  const void* home_stack = nullptr;
  size_t home_size = 0;
  unsigned running = 0;
  const std::function<void()>* body = nullptr;
  struct Array {
    std::unique_ptr<char[]> memory;
    size_t bytes;
  };
  std::map<int, Array> arrays;  // shared ones of the running block

  ~Pool() {
    for (Fiber& f : fibers) munmap(f.stack, stack_bytes);
  }
};

thread_local Pool pool;
thread_local const char* failure = nullptr;
std::atomic<Order> order{Order::forward};
std::atomic<uint64_t> order_seed{0};
std::atomic<int64_t> n_launches{0}, failing{-1};

void to_home([[maybe_unused]] bool for_good) {
  Fiber& f = pool.fibers[pool.running];
#ifdef PT_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &f.asan, pool.home_stack, pool.home_size);
#endif
#if defined(__x86_64__)
  pt_simt_switch(&f.context, pool.home);
#else
  swapcontext(&f.context, &pool.home);
#endif
#ifdef PT_ASAN
  __sanitizer_finish_switch_fiber(f.asan, nullptr, nullptr);
#endif
}

void run_thread() {
#ifdef PT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &pool.home_stack, &pool.home_size);
#endif
  (*pool.body)();
  pool.fibers[pool.running].state = State::done;
  to_home(true);
  std::abort();
}

void start(Fiber& f) {
  if (!f.stack) {
    f.stack = static_cast<char*>(
        mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (f.stack == MAP_FAILED) std::abort();
  }
  f.state = State::ready;
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(f.stack + stack_bytes) - 2;  // as after a call: 8 beyond a multiple of 16
  *top = reinterpret_cast<void*>(&run_thread);
  f.context = top - 6;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack;
  f.context.uc_stack.ss_size = stack_bytes;
  f.context.uc_link = nullptr;
  makecontext(&f.context, run_thread, 0);
#endif
}

// Runs thread t until it ends or waits.
void resume(unsigned t) {
  pool.running = t;
  threadIdx = {t, 0, 0};
  Fiber& f = pool.fibers[t];
  watch_thread(t, f.stack, stack_bytes);
#ifdef PT_ASAN
  __sanitizer_start_switch_fiber(&pool.home_asan, f.stack, stack_bytes);
#endif
#if defined(__x86_64__)
  pt_simt_switch(&pool.home, f.context);
#else
  swapcontext(&pool.home, &f.context);
#endif
#ifdef PT_ASAN
  __sanitizer_finish_switch_fiber(pool.home_asan, nullptr, nullptr);
#endif
}

uint64_t next_random(uint64_t& state) {
  state += 0x9e3779b97f4a7c15u;
  uint64_t x = state;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

std::vector<unsigned> sequence(unsigned n, uint64_t& random) {
  std::vector<unsigned> all(n);
  std::iota(all.begin(), all.end(), 0u);
  for (unsigned i = n; order == Order::seeded && i > 1; --i) std::swap(all[i - 1], all[next_random(random) % i]);
  if (order == Order::reverse) std::vector<unsigned>(all.rbegin(), all.rend()).swap(all);
  return all;
}

[[noreturn]] void stuck(unsigned threads, const char* why) {
  std::fprintf(stderr, "simt: block %u: %s\n", blockIdx.x, why);
  int lines = 0;
  for (unsigned t = 0; t < threads && lines < 64; ++t) {
    const Fiber& f = pool.fibers[t];
    if (t > 0 && f.state == pool.fibers[t - 1].state && f.line == pool.fibers[t - 1].line) continue;
    ++lines;
    if (f.state == State::done) {
      std::fprintf(stderr, "  from thread %u on: returned\n", t);
    } else {
      std::fprintf(stderr, "  from thread %u on: waits for its %s at %s:%d\n", t,
                   f.state == State::in_block ? "block" : "warp", f.file, f.line);
    }
  }
  std::fflush(stderr);
  std::abort();
}

bool same_place(const Fiber& a, const Fiber& b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

// Lets go on who has met everybody; false if nobody has.
bool release(unsigned threads) {
  bool any = false;
  for (unsigned first = 0; first < threads; first += warp) {
    for (unsigned lane = 0; lane < warp && first + lane < threads; ++lane) {
      Fiber& f = pool.fibers[first + lane];
      if (f.state != State::in_warp) continue;
      bool all = true;
      for (unsigned other = 0; other < warp; ++other) {
        if (!(f.mask >> other & 1)) continue;
        const unsigned t = first + other;
        all = all && t < threads && pool.fibers[t].state == State::in_warp && pool.fibers[t].mask == f.mask &&
              same_place(pool.fibers[t], f);
      }
      if (!all) continue;
      const unsigned mask = f.mask;
      for (unsigned other = 0; other < warp; ++other) {
        if (!(mask >> other & 1)) continue;
        Fiber& met = pool.fibers[first + other];
        met.state = State::ready;
        met.shown = met.given;
      }
      watch_meeting(first, mask);
      any = true;
    }
  }
  if (any) return true;
  for (unsigned t = 0; t < threads; ++t) {
    const Fiber& f = pool.fibers[t];
    if (f.state != State::in_block || !same_place(f, pool.fibers[0])) return false;
  }
  for (unsigned t = 0; t < threads; ++t) pool.fibers[t].state = State::ready;
  watch_barrier();
  return true;
}

void run_block(unsigned threads, uint64_t& random) {
  pool.arrays.clear();
  for (unsigned t = 0; t < threads; ++t) start(pool.fibers[t]);
  watch_block(blockIdx.x, threads);
  while (true) {
    for (const unsigned t : sequence(threads, random)) {
      if (pool.fibers[t].state == State::ready) resume(t);
    }
    unsigned done = 0;
    for (unsigned t = 0; t < threads; ++t) done += pool.fibers[t].state == State::done;
    if (done == threads) return;
    if (!release(threads)) stuck(threads, "threads wait for each other at different places, or for one that returned");
  }
}

void wait(State state, unsigned mask, const char* file, int line) {
  Fiber& f = pool.fibers[pool.running];
  f.state = state;
  f.mask = mask;
  f.file = file;
  f.line = line;
  to_home(false);
}

}  // namespace

void set_order(Order wanted, uint64_t seed) {
  order = wanted;
  order_seed = seed;
}

int64_t launches() { return n_launches; }

void fail_launch(int64_t launch) { failing = n_launches + launch; }

const char* launch_error() { return std::exchange(failure, nullptr); }

void launch(unsigned blocks, unsigned threads, const std::function<void()>& thread) {
  if (n_launches++ == failing) {
    failure = "a failure that simt was told to make";
    return;
  }
  if (blocks == 0 || threads == 0 || threads > 1024) {
    failure = "invalid configuration argument";
    return;
  }
  if (pool.fibers.size() < threads) pool.fibers.resize(threads);
  pool.body = &thread;
  gridDim = {blocks, 1, 1};
  blockDim = {threads, 1, 1};
  uint64_t random = order_seed;
  watch_launch();
  for (const unsigned b : sequence(blocks, random)) {
    blockIdx = {b, 0, 0};
    run_block(threads, random);
  }
  watch_end();
  pool.arrays.clear();
}

void* shared(int id, size_t bytes) {
  Pool::Array& array = pool.arrays[id];
  if (!array.memory) {
    array = {std::unique_ptr<char[]>(new char[bytes]), bytes};
    std::memset(array.memory.get(), 0xff, bytes);  // every float and double of these bits is a nan
    watch_shared(array.memory.get(), bytes);
  }
  return array.memory.get();
}

void meet_block(const char* file, int line) { wait(State::in_block, 0, file, line); }

void meet_warp(unsigned mask, const char* file, int line) { wait(State::in_warp, mask, file, line); }

uint64_t exchange(unsigned mask, uint64_t mine, unsigned lane, const char* file, int line) {
  Fiber& f = pool.fibers[pool.running];
  const unsigned first = pool.running / warp * warp;
  if (!(mask >> (pool.running % warp) & 1)) {
    stuck(blockDim.x, "a thread takes part in a shuffle that its mask leaves out");
  }
  f.given = mine;
  wait(State::in_warp, mask, file, line);
  if (lane >= warp || !(mask >> lane & 1)) return ~uint64_t{0};
  return pool.fibers[first + lane].shown;
}

void fence() { watch_fence(); }

}  // namespace simt
