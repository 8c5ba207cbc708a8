// Holds the chosen level; the kernels themselves stand in one file an instruction set.
#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>

namespace pytrain {

namespace baseline {
extern const cpu::Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const cpu::Kernels kernels;
}
namespace avx512 {
extern const cpu::Kernels kernels;
}
#endif

namespace cpu {
namespace {
constexpr int not_chosen = -1;
std::atomic<int> chosen{not_chosen};
}  // namespace

Isa current_isa() {
  int level = chosen.load(std::memory_order_relaxed);
  if (level == not_chosen) {
    const char* const wanted = std::getenv("PYTRAIN_ISA");
    level = static_cast<int>(choose_isa(wanted ? wanted : ""));
    chosen.store(level, std::memory_order_relaxed);
  }
  return static_cast<Isa>(level);
}

void set_isa(Isa isa) { chosen.store(static_cast<int>(isa), std::memory_order_relaxed); }

const Kernels& current_kernels() {
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::avx512:
      return avx512::kernels;
    case Isa::avx2:
      return avx2::kernels;
    case Isa::baseline:
      break;
  }
#endif
  return baseline::kernels;
}

}  // namespace cpu
}  // namespace pytrain
